"""The demo: page, pictures, table, correctness of what it compares with, and its errors."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from effops import plan_mask, reference, sps_from_dense, sps_to_dense
from effops.demo import Settings, _memory, _photos, _timing, run
from effops.demo._extras import MissingExtraError, require
from effops.demo._section import Row
from effops.demo.sections import (
    SECTIONS,
    _expected_flow_pictures,
    _mean_shift_pictures,
    _pairwise_embedding_loss_net,
    _sps_conv2d_head,
    expected_flow,
    filter_flow,
    load,
    mean_shift,
    pairwise_embedding_loss,
    perforated_conv2d,
    sps_conv2d,
)
from effops.demo.sections.hamming_match import plain_binnorm, plain_hamming_match
from effops.demo.sections.ms_deform_attn import plain_pytorch
from effops.demo.sections.roi_align import plain_point_sample, plain_roi_align

#: Ops of the sections that hold more than the op they are named after.
OPS = {
    "roi_align": {"roi_align", "point_sample"},
    "hamming_match": {"hamming_match", "binnorm"},
    "sps_conv2d": {"sps_conv2d", "sps_refine"},
    "perforated_conv2d": {"perforated_conv2d", "select_conv2d"},
    "expected_flow": {"expected_flow", "neighborhood_dot", "neighborhood_mix", "local_attention"},
}

PICTURES = {  # of each section
    "ms_deform_attn": 5,
    "roi_align": 4,
    "hamming_match": 3,
    "sps_conv2d": 4,
    "perforated_conv2d": 5,
    "filter_flow": 3,
    "expected_flow": 3,
    "mean_shift": 3,
    "pairwise_embedding_loss": 3,
}


def tiny(folder, sections=tuple(SECTIONS)):
    return Settings(folder, sections, photo_side=64, seconds=0.0, learning_steps=3)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a small run."""
    return run(tiny(tmp_path_factory.mktemp("demo") / "made" / "here"))


def test_every_picture_of_the_page_is_there(page):
    html = page.read_text(encoding="utf-8")
    pictures = re.findall(r'<img src="([^"]+)"', html)
    assert set(PICTURES) == set(SECTIONS)
    assert len(pictures) == len(set(pictures)) == sum(PICTURES.values())
    for name in pictures:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in page.parent.iterdir()} == {"index.html", *pictures}


def test_the_page_needs_nothing_from_elsewhere(page):
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.findall(r"https?://", html)
    assert str(page.parent) not in html


def test_the_table_holds_every_comparison(page):
    html = page.read_text(encoding="utf-8")
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in html.splitlines() if " ms</td>" in line]
    assert [row[1] for row in rows if row[0] == "ms_deform_attn"] == [
        f"{queries}, {direction}"
        for queries in ("decoder", "encoder")
        for direction in ("forward", "fwd + bwd")
    ]
    for op, case in (("roi_align", "boxes"), ("point_sample", "points")):
        assert [row[1] for row in rows if row[0] == op] == [f"{case}, forward", f"{case}, fwd + bwd"]
    assert [row[1] for row in rows if row[0] == "hamming_match"] == ["mutual", "ratio 0.8"]
    assert [row[1] for row in rows if row[0] == "binnorm"] == ["forward", "fwd + bwd"]
    assert [row[1] for row in rows if row[0] == "sps_conv2d"] == [
        *(f"stage {number}, forward" for number in (1, 2, 3)),
        "stage 3, fwd + bwd",
        "head, forward",
    ]
    assert [row[1] for row in rows if row[0] == "sps_refine"] == ["before stage 3"]
    assert [row[1] for row in rows if row[0] == "perforated_conv2d"] == [
        *(f"{share}%, forward" for share in (5, 20, 40)),
        "20%, fwd + bwd",
        "PAG unit",
        "deblurring",
    ]
    assert [row[1] for row in rows if row[0] == "select_conv2d"] == ["forward", "fwd + bwd"]
    assert [row[1] for row in rows if row[0] == "filter_flow"] == [
        f"denoising, {direction}" for direction in ("forward", "fwd + bwd")
    ]
    for op in (
        "expected_flow",
        "neighborhood_dot",
        "neighborhood_mix",
        "local_attention",
        "mean_shift",
        "pairwise_embedding_loss",
    ):
        assert [row[1] for row in rows if row[0] == op] == ["forward", "fwd + bwd"]
    for row in rows:
        ours, plain, ratio, error = (float(re.match(r"[\d.e+-]+", cell)[0]) for cell in row[3:])
        assert ours > 0
        assert plain > 0
        assert ratio >= 0
        assert error < 2e-5
    for fact in (torch.__version__, "instruction set used", "cores"):
        assert fact in html


@pytest.mark.same_native  # as for the page
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_says_how_many_steps_it_takes(name, tmp_path):
    section, steps = load(name), []
    result = section.run(tiny(tmp_path), steps.append)
    assert len(steps) == section.steps
    assert result.text
    assert {row.op for row in result.rows} == OPS.get(name, {name})
    assert all(row.is_correct for row in result.rows)


def test_a_wrong_result_is_shown_and_ends_in_an_error(tmp_path, monkeypatch, capsys):
    module = importlib.import_module(SECTIONS["ms_deform_attn"])
    monkeypatch.setattr(module, "_TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="1"):
        run(tiny(tmp_path, ("ms_deform_attn",)))
    assert "further from the definition" in capsys.readouterr().out
    assert "wrong" in (tmp_path / "index.html").read_text(encoding="utf-8").split("</style>")[1]


def test_plain_pytorch_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (2, 3)]
    value = torch.randn(2, 26, 3, 8, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 7, 3, 2, 4, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 7, 3, 2, 4, generator=generator, dtype=torch.float64)
    plain = plain_pytorch(value, shapes, locations, weights)
    exact = reference.ms_deform_attn(value, shapes, None, locations, weights)
    torch.testing.assert_close(plain, exact)
    assert plain.is_contiguous()


def test_plain_roi_align_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    pyramid = [torch.randn(1, 3, *size, generator=generator).double() for size in ((8, 12), (4, 6), (2, 3))]
    first = torch.rand(9, 2, generator=generator).double() * torch.tensor([24.0, 16.0])
    last = first + torch.rand(9, 2, generator=generator) * (torch.tensor([48.0, 32.0]) - first)
    rois = torch.cat([torch.zeros(9, 1), first, last], 1)
    level = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 2])  # none on the map in the middle
    plain = plain_roi_align(pyramid, rois[:, 1:], level, 3, 2, strides=(4, 8, 16))
    exact = reference.roi_align(pyramid, rois, level, 3, 2, strides=(4, 8, 16))
    torch.testing.assert_close(plain, exact)


def test_plain_point_sample_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    pyramid = [torch.randn(1, 3, *size, generator=generator).double() for size in ((8, 12), (4, 6), (2, 3))]
    xy = torch.rand(40, 2, generator=generator).double() * 1.4 - 0.2
    level = torch.randint(2, (40,), generator=generator) * 2  # none on the map in the middle
    exact = reference.point_sample(pyramid, torch.zeros_like(level), level, xy)
    torch.testing.assert_close(plain_point_sample(pyramid, level, xy), exact)


@pytest.mark.parametrize("ratio", [None, 0.9])
def test_plain_hamming_match_is_the_same_function(ratio):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(256, (rows, 4), generator=generator, dtype=torch.uint8) for rows in (50, 60))
    matches, _ = reference.hamming_match(a, b, ratio, mutual=ratio is None)
    assert 5 < len(matches) < 50
    assert plain_hamming_match(a, b, ratio).equal(matches)


def test_plain_binnorm_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 20, generator=generator, dtype=torch.float64).requires_grad_()
    plain, exact = plain_binnorm(x, 7), reference.binnorm(x, 7)
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-7)
    grad = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(output, x, grad)[0] for output in (plain, exact))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_plain_sps_conv2d_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, 7, generator=generator) < 0.4
    sps = sps_from_dense(x, mask)
    fields = (sps.active, sps.passive, sps.index_map, sps.roi, sps.xy)
    weights = list(torch.randn(3, 5, 3, 3, 3, generator=generator, dtype=torch.float64))
    biases = list(torch.randn(3, 5, generator=generator, dtype=torch.float64))
    branches = (weights, biases, [1, 3, 5])
    exact = reference.sps_conv2d(*fields, *branches, activation="relu")
    torch.testing.assert_close(sps_conv2d.plain_gather(sps, *branches), exact)
    dense = _sps_conv2d_head.plain_dense(x, *branches).permute(0, 2, 3, 1)
    torch.testing.assert_close(dense[mask], exact)


@pytest.mark.parametrize("count", [0, 5, 99])
def test_plain_sps_refine_is_the_same_function(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    sps = sps_from_dense(x, torch.rand(2, 4, 5, generator=generator) < 0.5)
    scores = torch.randn(len(sps.active), generator=generator)
    plain = sps_conv2d.plain_refine(sps, scores, count).validate()
    exact = reference.sps_refine(sps, scores, count)
    assert all(torch.equal(getattr(plain, name), getattr(exact, name)) for name in vars(exact))
    assert sps_to_dense(plain).equal(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_dense_head_gives_the_masks_of_the_sparse_one():
    coins = _sps_conv2d_head.find_coins("cpu")
    assert len(coins.boxes) == 24
    head = _sps_conv2d_head.learn(coins, 1)
    some = coins.part(slice(0, 24, 8))
    with torch.no_grad():
        coarse, stages = head(some.pyramid, some.boxes)
        dense = head.dense(some.pyramid, some.boxes, [stage.active for stage in stages])
    assert coarse.shape == (3, 1, 8, 8)
    for stage, logits, refined in zip(stages, dense, _sps_conv2d_head.REFINED, strict=True):
        stage.after.validate()
        assert len(stage.after.active) == 4 * 3 * refined
        torch.testing.assert_close(stage.logits, logits, rtol=1e-4, atol=1e-5)


def test_plain_perforated_conv2d_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, 7, generator=generator) < 0.3
    exact = reference.perforated_conv2d(x, weight, mask, bias, padding=1)
    torch.testing.assert_close(perforated_conv2d.plain_masked(x, weight, mask, bias), exact)
    torch.testing.assert_close(perforated_conv2d.plain_gather(x, weight, plan_mask(mask), bias), exact)


def test_plain_select_conv2d_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, 3, 3, 3, 3, generator=generator, dtype=torch.float64)
    choice = torch.randint(-1, 3, (2, 6, 7), generator=generator)
    exact = reference.select_conv2d(x, weights, choice, (0, 1, 4))
    torch.testing.assert_close(perforated_conv2d.plain_select(x, weights, choice, (0, 1, 4)), exact)


def test_a_gated_unit_is_the_dense_one_times_the_gate():
    torch.manual_seed(0)
    unit = perforated_conv2d.PagUnit(6, 4)
    x, gate = torch.randn(2, 6, 5, 7), torch.rand(2, 5, 7) < 0.4
    with torch.no_grad():
        torch.testing.assert_close(unit(x, plan_mask(gate)), unit.plain(x, gate))


@pytest.mark.parametrize("plain", [filter_flow.plain_unfold, filter_flow.plain_by_tap])
def test_plain_filter_flow_is_the_same_function(plain):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    filters = torch.randn(2, 25, 6, 7, generator=generator, dtype=torch.float64)
    exact = reference.filter_flow(image, filters, padding_mode="renormalize")
    torch.testing.assert_close(plain(image, filters), exact)


def test_plain_ops_of_windows_are_the_same_functions():
    generator = torch.Generator().manual_seed(0)
    q, k, v, filters = (
        torch.randn(2, channels, 6, 7, generator=generator, dtype=torch.float64) for channels in (4, 4, 3, 25)
    )
    for plain, exact in (
        (expected_flow.plain_expected_flow(filters), reference.expected_flow(filters)),
        (expected_flow.plain_neighborhood_dot(q, k, 5), reference.neighborhood_dot(q, k, 5)),
        (expected_flow.plain_neighborhood_mix(filters, v), reference.neighborhood_mix(filters, v)),
        (
            expected_flow.plain_local_attention(q, k, v, 5, scale=2.0),
            reference.local_attention(q, k, v, 5, scale=2.0),
        ),
    ):
        torch.testing.assert_close(plain, exact)


def test_bilinear_filters_are_grid_sample_and_hold_their_flow():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    flow = torch.rand(2, 2, 6, 7, generator=generator, dtype=torch.float64) * 4 - 2
    filters = _expected_flow_pictures.bilinear_filters(flow, 5)
    moved = reference.filter_flow(image, filters, normalize="none", padding_mode="replicate")
    torch.testing.assert_close(moved, _expected_flow_pictures.warp_by_grid_sample(image, flow))
    torch.testing.assert_close(reference.expected_flow(filters, normalize="none"), flow)


@pytest.mark.parametrize("plain", [mean_shift.plain_attention, mean_shift.plain_matrix])
def test_plain_mean_shift_is_the_same_function(plain):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    exact = reference.mean_shift(x, 20.0, iterations=3)
    torch.testing.assert_close(plain(x, 20.0, iterations=3), exact)


def test_plain_pairwise_embedding_loss_is_the_same_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (30,), generator=generator)
    exact = reference.pairwise_embedding_loss(x, labels)
    torch.testing.assert_close(pairwise_embedding_loss.plain_loss(x, labels), exact)


def test_the_kernel_on_the_sphere_is_the_gaussian_of_the_features():
    """As far as it matters, and colours come back from the sphere."""
    photo = _photos.load("astronaut", 20)
    features = _mean_shift_pictures.features_of(photo)
    points = _mean_shift_pictures.embed(features)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(400))
    kernel = (_mean_shift_pictures.KAPPA * (points @ points.T - 1)).exp()
    gaussian = (-(features[:, None] - features).square().sum(2) / 2).exp()
    assert gaussian.median() < 1e-6
    torch.testing.assert_close(kernel, gaussian, rtol=0, atol=0.01)
    colours = _mean_shift_pictures.colours_at(points)
    torch.testing.assert_close(colours, photo.flatten(1).T, rtol=0, atol=1e-5)


def test_every_segment_has_its_mean_colour():
    photo = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    means = _mean_shift_pictures.mean_colours(photo, torch.tensor([[0, 0, 1], [1, 0, -1]]))
    torch.testing.assert_close(means[:, 0, 0], (photo[:, 0, 0] + photo[:, 0, 1] + photo[:, 1, 1]) / 3)
    torch.testing.assert_close(means[:, 1, 0], (photo[:, 0, 2] + photo[:, 1, 0]) / 2)
    assert means[:, 0, 0].equal(means[:, 1, 1])
    assert means[:, 1, 2].tolist() == [1, 1, 1]


def test_mean_shift_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(mean_shift, "has_sklearn", lambda: False)
    result = load("mean_shift").run(tiny(tmp_path), lambda _: None)
    assert len(result.figures) == PICTURES["mean_shift"]
    assert not any("scikit-learn" in figure.caption for figure in result.figures)


def test_scenes_of_shapes():
    scenes = _pairwise_embedding_loss_net.make_scenes(3, 0)
    side = _pairwise_embedding_loss_net.SIDE
    assert scenes.pictures.shape == (3, 3, side, side)
    assert 0 <= float(scenes.pictures.min()) < float(scenes.pictures.max()) <= 1
    for labels in scenes.labels:
        assert 4 <= int(labels.max()) <= 8
        assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    again, other = (_pairwise_embedding_loss_net.make_scenes(3, seed) for seed in (0, 1))
    assert again.pictures.equal(scenes.pictures)
    assert not other.pictures.equal(scenes.pictures)


def test_an_embedding_is_learned_within_seconds():
    unseen = _pairwise_embedding_loss_net.make_scenes(4, 1)
    training = _pairwise_embedding_loss_net.learn(60, unseen)
    (first, before), *_, (last, after) = training.scores
    assert (first, last) == (0, 60)
    assert before < 0.3
    assert after > 0.5
    assert training.losses[-1] < 0.6 * training.losses[0]


def test_adjusted_rand_index():
    index = _pairwise_embedding_loss_net.adjusted_rand_index
    truth = torch.tensor([0, 0, 0, 1, 1, 1])
    assert index(torch.tensor([5, 5, 5, -1, -1, -1]), truth) == 1
    assert index(torch.zeros(6, dtype=torch.int64), truth) == 0
    found = torch.tensor([0, 0, 1, 1, 2, 2])  # scikit-learn's example says 0.2424...
    assert index(found, truth) == pytest.approx(8 / 33)
    assert index(truth, found) == pytest.approx(8 / 33)
    assert index(truth, truth) == 1
    assert index(torch.zeros(6), torch.zeros(6)) == 1
    assert _pairwise_embedding_loss_net.score(found, truth) == 0


def test_memory_of_a_call():
    def call():
        return torch.ones(2**22).sum()  # 16 MiB

    call()
    needed = _memory.extra_bytes(call)
    if needed is None:
        pytest.skip("the system does not tell")
    assert 15 * 2**20 < needed < 18 * 2**20
    small = _memory.extra_bytes(lambda: None)
    assert small < 2**20


def test_memory_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(_memory, "_FORGET", tmp_path / "absent" / "clear_refs")
    assert _memory.extra_bytes(lambda: None) is None


def test_denoising_without_opencv(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("effops.demo._extras.find_spec", lambda name: None if name == "cv2" else find(name))
    result = load("filter_flow").run(tiny(tmp_path), lambda _: None)
    assert len(result.figures) == PICTURES["filter_flow"]
    assert 'cv2 not installed; run: pip install "effops[demo]"' in result.figures[0].caption


def test_matches_without_opencv_or_faiss(tmp_path, monkeypatch):
    def without(name):
        find = importlib.util.find_spec
        return lambda wanted, *rest: None if wanted == name else find(wanted, *rest)

    monkeypatch.setattr("effops.demo.sections.hamming_match.find_spec", without("faiss"))
    result = load("hamming_match").run(tiny(tmp_path), lambda _: None)
    assert len(result.figures) == PICTURES["hamming_match"]
    assert not any("faiss" in figure.caption for figure in result.figures)

    monkeypatch.setattr("effops.demo._extras.find_spec", without("cv2"))
    result = load("hamming_match").run(tiny(tmp_path), lambda _: None)
    assert 'cv2 not installed; run: pip install "effops[demo]"' in result.text
    assert {row.op for row in result.rows} == {"binnorm"}
    assert len(result.figures) == 1


@pytest.mark.parametrize("name", _photos.CREDITS)
def test_photographs_ship_with_scikit_image(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a photograph is downloaded"))
    photo = _photos.load(name, 100)
    assert photo.shape[0] == 3
    assert max(photo.shape) == 100
    assert photo.min() >= 0
    assert photo.max() <= 1
    assert photo.std() > 0.05


def test_pyramid():
    pyramid = _photos.make_pyramid(_photos.load("coffee", 100), heads=4, channels=8)
    assert pyramid.shapes == [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert pyramid.value.shape == (1, 17 * 25 + 9 * 13 + 5 * 7 + 3 * 4, 4, 8)
    assert pyramid.value.isfinite().all()
    assert 0.5 < float(pyramid.value.std()) < 2


def test_times_take_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = _timing.interleaved_min(functions, seconds=0, min_rounds=3)
    assert calls == ["a", "b"] * 4
    assert times.keys() == {"a", "b"}
    assert all(0 <= seconds < 1 for seconds in times.values())


def test_one_thread():
    before = torch.get_num_threads()
    with _timing.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_row():
    row = Row("op", "case", "shape", seconds=0.5, plain_seconds=2.0, error=1e-6, tolerance=1e-5)
    assert row.ratio == 4
    assert row.is_correct
    assert not Row("op", "case", "shape", 1.0, 1.0, error=float("nan"), tolerance=1e-5).is_correct


@pytest.mark.parametrize(
    ("sections", "device", "words"),
    [
        (["ms_deform_attn", "nothing"], "auto", "expected sections among ms_deform_attn.*got nothing"),
        ([], "auto", "expected sections among ms_deform_attn"),
        (["ms_deform_attn"], "tpu", "expected device auto, cpu or cuda, got tpu"),
    ],
)
def test_wrong_settings(tmp_path, sections, device, words):
    with pytest.raises(ValueError, match=words):
        Settings.make(tmp_path, sections, device=device)


def test_a_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device for effops"):
        Settings.make(tmp_path, ["ms_deform_attn"], device="cuda")
    assert Settings.make(tmp_path, ["ms_deform_attn"]).device == "cpu"


def test_missing_packages(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "effops.demo._extras.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(
        MissingExtraError, match=r'matplotlib not installed; run: pip install "effops\[demo\]"'
    ):
        run(tiny(tmp_path))
    require("rich")


def test_importing_the_demo_needs_torch_alone(tmp_path):
    absent = ["rich", "typer", "matplotlib", "skimage", "sklearn", "scipy", "cv2", "faiss"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({absent}); "
        f"import effops.cli, effops.collect_env, {', '.join(SECTIONS.values())}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
