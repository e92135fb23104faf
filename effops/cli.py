"""The command line: ``effops`` or ``python -m effops`` with ``demo``, ``bench`` or ``collect-env``.

It needs typer, from the extra ``effops[demo]``; ``collect-env`` also works without.
"""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from effops import collect_env

if TYPE_CHECKING:
    import typer

_BENCH_FILES = ("report.py", "bench_ms_deform_attn.py")


def main() -> None:
    """Runs the command line."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if sys.argv[1:] == ["collect-env"]:
            collect_env.main()
            return
        sys.exit(f'effops: the command line needs {error.name}; run: pip install "effops[demo]"')
    app()


def build_app() -> "typer.Typer":
    """The commands."""
    import typer

    from effops.demo import Settings, run
    from effops.demo._extras import MissingExtraError
    from effops.demo.sections import SECTIONS

    app = typer.Typer(
        name="effops",
        help="Operators for efficient vision networks, as real torch ops on CPU and CUDA.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def demo(
        output: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("effops-demo"),
        sections: Annotated[
            str, typer.Option(help=f"Comma-separated, among: {', '.join(SECTIONS)}.")
        ] = ",".join(SECTIONS),
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        quick: Annotated[bool, typer.Option("--quick", help="Small pictures and few runs.")] = False,
    ) -> None:
        """Run every op on real photographs, compare with plain PyTorch and write a page."""
        try:
            settings = Settings.make(output, sections.split(","), device=device, quick=quick)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            run(settings)
        except MissingExtraError as error:
            typer.echo(error, err=True)
            raise typer.Exit(1) from None

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def bench(context: typer.Context) -> None:
        """Run the benchmarks of a source checkout; further arguments go to pytest."""
        folder = find_bench()
        if folder is None:
            typer.echo(
                "effops bench: no folder bench/ here or beside the package: benchmarks are part of the "
                "source repository, not of the wheel. Run this in the root of a checkout.",
                err=True,
            )
            raise typer.Exit(1)
        command = [sys.executable, str(folder / "report.py"), "run", *context.args]
        raise typer.Exit(subprocess.run(command, check=False).returncode)

    @app.command("collect-env")
    def collect_env_command() -> None:
        """Print what a bug report needs."""
        collect_env.main()

    return app


def find_bench() -> Path | None:
    """The repository's folder bench/: in the current folder, or beside the package's sources."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        folder = root / "bench"
        if all((folder / name).is_file() for name in _BENCH_FILES):
            return folder
    return None
