"""Image metrics against closed forms, scipy, torchmetrics and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import linalg
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference_ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as reference_ssim
from torchmetrics.image.kid import poly_mmd

from compdiff import metrics


def textbook_fid(a, b):
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(ca @ cb).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root)


def with_exact_moments(rng, n, mean, cov):
    """n points whose sample mean and covariance are exactly these."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_fid_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mean_a, mean_b, var_a, var_b = (
        rng.normal(size=6),
        rng.normal(size=6),
        rng.uniform(0.5, 2, 6),
        rng.uniform(0.5, 2, 6),
    )
    a, b = with_exact_moments(rng, 40, mean_a, np.diag(var_a)), with_exact_moments(rng, 70, mean_b, np.diag(var_b))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    assert metrics.fid(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (30, 200, 12), (9, 150, 12), (9, 10, 12)])
def test_fid_is_scipys_matrix_square_root_also_for_fewer_images_than_dimensions(n, m, d):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(size=(m, d)) + 0.3
    assert metrics.fid(a, b) == pytest.approx(textbook_fid(a, b), rel=1e-5)  # sqrtm of a singular matrix is that exact


def test_fid_matches_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x.reshape(len(x), -1)[:, :8].double()

    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 256, (2, 60, 8))
    b[:, :4] //= 2
    reference = image.FrechetInceptionDistance(feature=Features(), input_img_size=(3, 2, 4)).set_dtype(torch.float64)
    for x, real in ((a, True), (b, False)):
        x = np.pad(x, ((0, 0), (0, 16))).reshape(-1, 3, 2, 4)
        reference.update(torch.tensor(x, dtype=torch.uint8), real=real)
    assert metrics.fid(a, b) == pytest.approx(float(reference.compute()), rel=1e-6)


def test_moments_may_be_computed_once():
    a, b = np.random.default_rng(3).normal(size=(2, 20, 7))
    assert metrics.fid(metrics.moments(a), metrics.moments(b)) == metrics.fid(a, b)


def test_fid_rises_for_small_samples_and_matched_fid_does_not_depend_on_group_size():
    rng = np.random.default_rng(4)
    real, small, large = (rng.normal(size=(n, 16)) for n in (400, 40, 400))
    assert metrics.fid(small, real) > 2 * metrics.fid(large, real)  # the bias that size matching removes
    at_30 = [metrics.matched_fid(x, real, 30, 40, seed=0).mean() for x in (small, large)]
    assert at_30[0] == pytest.approx(at_30[1], rel=0.15)
    np.testing.assert_array_equal(
        metrics.matched_fid(large, real, 30, 3, seed=5), metrics.matched_fid(large, real, 30, 3, seed=5)
    )
    with pytest.raises(ValueError, match="common size 50"):
        metrics.matched_fid(small, real, 50, 1, seed=0)


def test_kid_is_a_plain_double_loop_and_torchmetrics():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(11, 5)), rng.normal(size=(8, 5)) + 0.5
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3  # noqa: E731
    within_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    expected = within_a + within_b - 2 * np.mean([k(x, y) for x in a for y in b])
    assert metrics.kid(a, b) == pytest.approx(expected, rel=1e-12)
    assert metrics.kid(a, b[:8]) != metrics.kid(a[:8], b)
    assert metrics.kid(a[:8], b) == pytest.approx(float(poly_mmd(torch.tensor(a[:8]), torch.tensor(b))), rel=1e-9)


def test_kid_is_unbiased_where_fid_is_not():
    rng = np.random.default_rng(6)
    pairs = [(rng.normal(size=(12, 4)), rng.normal(size=(12, 4))) for _ in range(300)]
    kids = np.array([metrics.kid(a, b) for a, b in pairs])
    assert abs(kids.mean()) < 4 * kids.std() / np.sqrt(len(kids))
    assert np.mean([metrics.fid(a, b) for a, b in pairs]) > 0.3


finite = st.floats(-10, 10, width=32)
features = st.integers(3, 12).flatmap(lambda n: arrays(np.float64, (n, 4), elements=finite))


@settings(max_examples=60)
@given(a=features, b=features, seed=st.integers(0, 99))
def test_fid_and_kid_are_symmetric_order_free_and_zero_on_themselves(a, b, seed):
    shuffled = np.random.default_rng(seed).permutation(a)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-8 * (1 + np.sum(a**2)))
    for distance in (metrics.fid, metrics.kid):
        assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-7, abs=1e-5)
        assert distance(shuffled, b) == pytest.approx(distance(a, b), rel=1e-7, abs=1e-5)
    assert metrics.fid(a, b) >= 0


def test_features_that_are_not_features_raise():
    good = np.zeros((3, 2))
    for bad in (np.zeros(3), np.zeros((1, 2)), np.full((3, 2), np.nan)):
        with pytest.raises(ValueError, match="features"):
            metrics.fid(good, bad)


def plain_coverage(centres, points, k):
    inside = 0
    for p in points:
        for i, c in enumerate(centres):
            others = sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)
            if np.linalg.norm(p - c) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_a_plain_loop(k):
    rng = np.random.default_rng(7)
    real, fake = rng.normal(size=(30, 6)), 0.7 * rng.normal(size=(25, 6)) + 0.6
    precision, recall = metrics.precision_recall(real, fake, k)
    assert (precision, recall) == (plain_coverage(real, fake, k), plain_coverage(fake, real, k))
    assert precision != recall
    assert metrics.precision_recall(real, real, k) == (1, 1)
    assert metrics.precision_recall(real, fake + 100, k) == (0, 0)


def test_density_and_coverage_by_hand():
    """Real 0, 1, 3, 7 with k = 1: radii 1, 1, 2, 4. Fake 0.5 lies in the balls of 0, 1; 4 in 3, 7; 20 in none."""
    real, fake = np.array([[0.0], [1], [3], [7]]), np.array([[0.5], [4], [20]])
    assert metrics.density_coverage(real, fake, 1) == (pytest.approx(4 / 3), 1.0)
    assert metrics.density_coverage(real, fake[[0, 2]], 1) == (1.0, 0.5)
    with pytest.raises(ValueError, match="k = 5"):
        metrics.density_coverage(real, fake)


def test_density_and_coverage_of_one_distribution_have_their_expectation():
    """Naeem et al. 2020: density 1, coverage 1 - prod (n - i) / (n + m - i), whatever the distribution."""
    rng, n, m, k = np.random.default_rng(10), 20, 30, 3
    found = np.array([metrics.density_coverage(rng.normal(size=(n, 3)), rng.normal(size=(m, 3)), k) for _ in range(400)])
    expected = 1, 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    assert (np.abs(found.mean(0) - expected) < 4 * found.std(0) / np.sqrt(len(found))).all()
    assert expected[1] < 0.95  # so that a count of all images would be noticed


def test_one_outlier_fools_precision_not_density():
    rng = np.random.default_rng(11)
    real = np.vstack([rng.normal(size=(60, 2)), [[40.0, 40]]])
    fake = rng.uniform(5, 35, size=(60, 2))
    assert metrics.precision_recall(real, fake)[0] > 0.9
    assert metrics.density_coverage(real, fake)[0] < 0.25


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
def test_inception_score_matches_torchmetrics_and_its_limits():
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x.reshape(len(x), -1)[:, :8].double() / 40

    x = np.random.default_rng(12).integers(0, 256, (50, 3, 2, 4))
    reference = InceptionScore(feature=Logits(), splits=1)
    reference.update(torch.tensor(x, dtype=torch.uint8))
    p = torch.tensor(x.reshape(50, -1)[:, :8] / 40).softmax(1).numpy()
    assert metrics.inception_score(p) == pytest.approx(float(reference.compute()[0]), rel=1e-6)
    assert metrics.inception_score(np.eye(5)) == pytest.approx(5)  # sure of each, five classes
    assert metrics.inception_score(np.eye(5)[[2, 2, 2]]) == pytest.approx(1)  # sure of one
    assert metrics.inception_score(np.full((7, 5), 0.2)) == pytest.approx(1)  # sure of none
    for wrong in (np.ones((2, 3)), np.array([0.5, 0.5]), np.array([[1.5, -0.5]])):
        with pytest.raises(ValueError, match="sum to 1"):
            metrics.inception_score(wrong)


def test_mifid_matches_torchmetrics():
    """Bai et al. look from each generated image for the nearest training image; torchmetrics 1.9 from each `real` for
    the nearest `fake`, so the generated ones are handed over as `real`. FID is symmetric."""
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.reshape(len(x), -1)[:, :6].double()

    rng = np.random.default_rng(13)
    train = rng.integers(0, 256, (70, 3, 2, 4))
    for spread, copied in ((2, True), (120, False)):
        fake = np.clip(train[:40] + rng.integers(-spread, spread + 1, (40, 3, 2, 4)), 0, 255)
        reference = MemorizationInformedFrechetInceptionDistance(feature=Features(), cosine_distance_eps=0.01).set_dtype(torch.float64)
        for x, real in ((fake, True), (train, False)):
            reference.update(torch.tensor(x, dtype=torch.uint8), real=real)
        a, b = (x.reshape(len(x), -1)[:, :6].astype(float) for x in (fake, train))
        s = metrics.nearest_cosine(a, b).mean()
        assert (s < 0.01) == copied
        assert metrics.mifid(metrics.fid(a, b), s, tau=0.01) == pytest.approx(float(reference.compute()), rel=1e-5)


def test_nearest_cosine_is_a_plain_loop_in_any_chunk():
    rng = np.random.default_rng(14)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(7, 4))
    plain = [min(1 - abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for y in b) for x in a]
    np.testing.assert_allclose(metrics.nearest_cosine(a, b), plain, atol=1e-12)
    np.testing.assert_allclose(metrics.nearest_cosine(a, b, chunk=2), plain, atol=1e-12)
    np.testing.assert_allclose(metrics.nearest_cosine(-3 * b, b), 0, atol=1e-12)
    assert metrics.nearest_cosine(np.zeros((2, 4)), b).tolist() == [1, 1]


def textured(rng, n, size):
    smooth = rng.normal(size=(n, size, size)).cumsum(1).cumsum(2)
    smooth -= smooth.min((1, 2), keepdims=True)
    return (255 * smooth / smooth.max((1, 2), keepdims=True)).astype(np.uint8)


@pytest.mark.parametrize(("size", "scales"), [(176, 5), (64, 3), (32, 2)])
def test_ms_ssim_matches_torchmetrics(size, scales):
    rng = np.random.default_rng(8)
    a = textured(rng, 3, size)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    b[2] = 255 - a[2]  # anticorrelated: the similarity is clipped at 0
    betas = metrics.BETAS[:scales] / metrics.BETAS[:scales].sum()
    x, y = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (a, b))
    whole = reference_ms_ssim(x, y, data_range=255.0, betas=tuple(betas), normalize="relu", reduction="none").numpy()
    np.testing.assert_allclose(metrics.ms_ssim(a, b, scales), whole, atol=0.05)  # the border, see below
    # torchmetrics 1.9 crops the reflected border from every scale but the last; Wang et al. use valid windows
    # throughout.
    terms = []
    for _ in betas:
        options = {"data_range": 255.0, "reduction": "none"}
        full = reference_ssim(x, y, return_full_image=True, **options)[1][:, 0, 5:-5, 5:-5].mean((1, 2))
        terms.append(reference_ssim(x, y, return_contrast_sensitivity=True, **options)[1])
        x, y = (torch.nn.functional.avg_pool2d(v, 2) for v in (x, y))
    terms[-1] = full
    expected = np.prod([t.clamp(min=0).numpy() ** beta for t, beta in zip(terms, betas, strict=True)], axis=0)
    np.testing.assert_allclose(metrics.ms_ssim(a, b, scales), expected, atol=1e-9)
    np.testing.assert_allclose(metrics.ms_ssim(a, a, scales), 1)


def test_ms_ssim_variant_is_named_after_its_scales_and_small_images_raise():
    assert [metrics.ms_ssim_variant(s) for s in (512, 176, 175, 64, 32)] == [
        ("MS-SSIM", 5), ("MS-SSIM", 5), ("MS-SSIM-3", 3), ("MS-SSIM-3", 3), ("MS-SSIM-2", 2)]  # fmt: skip
    image = np.zeros((1, 175, 175), dtype=np.uint8)
    with pytest.raises(ValueError, match="176 px"):
        metrics.ms_ssim(image, image)
    with pytest.raises(ValueError, match="uint8"):
        metrics.ms_ssim(image.astype(float), image.astype(float), 3)
    with pytest.raises(ValueError, match="at least 22 px"):
        metrics.ms_ssim_variant(16)


def test_intra_prompt_similarity_is_the_mean_over_pairs_of_each_prompt():
    images = textured(np.random.default_rng(9), 6, 44)
    prompts = np.array(["b", "a", "b", "single", "b", "a"])
    one = lambda i, j: metrics.ms_ssim(images[[i]], images[[j]], 3)[0]  # noqa: E731
    expected = [one(1, 5), (one(0, 2) + one(0, 4) + one(2, 4)) / 3]
    np.testing.assert_allclose(metrics.ms_ssim_intra(images, prompts, 3), expected)
