"""Pictures of solutions: the panels that are there, their values, and files that are whole or not at all."""

import threading
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

from invdiff import CapabilityError, InputError, Problem, Solution, Variable, operators
from invdiff.solution_plot import plot_solution, save_picture


def solution_of(operator, truth, *, draws=20, noise_std=0.05, known=True, event=()):
    problem = Problem.simulate(operator, truth, noise_std=noise_std, event=event)
    generator = torch.Generator().manual_seed(1)
    x = truth + 0.1 * torch.randn(draws, *truth.shape, generator=generator)
    solution = Solution(
        event=problem.event,
        by_chain={problem.event[0].name: x[None]},
        deviance=torch.ones(1, draws),
        measurement=problem.likelihood.measurement[0],
        likelihood=problem.likelihood,
        about={"problem": "a problem", "prior": "a prior", "sampler": "PiGDM"},
    )
    return solution.with_reference(truth) if known else solution


def picture(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.images}


def shown(figure, title):
    return np.asarray(panels(figure)[title].images[0].get_array())


@pytest.mark.parametrize("channels", [1, 3])
def test_panels_hold_the_solutions_values(channels):
    solution = solution_of(operators.Scale((channels, 12, 16)), picture((channels, 12, 16)))
    figure = plot_solution(solution, draws=2)
    assert set(panels(figure)) == {
        "Measurement", "Mean", "Truth", "Standard deviation", "Error of the mean", "Draw 1", "Draw 2",
    }  # fmt: skip
    mean = solution.mean().clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    np.testing.assert_allclose(shown(figure, "Mean"), mean, rtol=1e-6)
    spread = (solution.std() ** 2).mean(0).sqrt()
    np.testing.assert_allclose(shown(figure, "Standard deviation"), spread, rtol=1e-5)
    error = ((solution.mean() - solution.reference["image"]) ** 2).mean(0).sqrt()
    np.testing.assert_allclose(shown(figure, "Error of the mean"), error, rtol=1e-5)
    scales = {panels(figure)[t].images[0].get_clim() for t in ("Standard deviation", "Error of the mean")}
    assert len(scales) == 1  # one colour bar speaks for both


@pytest.mark.parametrize(("factor", "scaled"), [(1.2, False), (200.0, True)])
def test_a_measurement_far_from_pixel_values_is_scaled(factor, scaled):
    truth = picture((3, 12, 16))
    y = factor * truth
    largest = float(y.flatten().sort().values[round(0.995 * y.numel()) - 1]) if scaled else 1.0
    solution = solution_of(operators.Scale((3, 12, 16), factor), truth, noise_std=1e-6)
    expected = (y / largest).clamp(0, 1).permute(1, 2, 0)
    np.testing.assert_allclose(shown(plot_solution(solution), "Measurement"), expected, atol=1e-5)


def test_colour_bar_names_units():
    figure = plot_solution(solution_of(operators.Scale((3, 12, 12)), picture((3, 12, 12))))
    assert any("pixel value" in axes.get_ylabel() for axes in figure.axes)


def test_inpainting_is_put_back_into_its_frame():
    mask = operators.box_mask((12, 12), 4)
    truth = picture((3, 12, 12))
    solution = solution_of(operators.Inpainting(mask, (3, 12, 12)), truth, noise_std=1e-3)
    image = shown(plot_solution(solution), "Measurement")
    np.testing.assert_allclose(image[mask.numpy()], truth.permute(1, 2, 0)[mask], atol=0.01)
    assert np.all(image[~mask.numpy()] == image[~mask.numpy()][0])
    assert "Measurement" not in panels(plot_solution(replace(solution, likelihood=None)))  # as after load


def test_downsampled_measurement_keeps_its_pixels():
    figure = plot_solution(solution_of(operators.Downsampling((3, 16, 16), 4), picture((3, 16, 16))))
    assert shown(figure, "Measurement").shape == (4, 4, 3)
    assert panels(figure)["Measurement"].images[0].get_interpolation() == "nearest"


def test_without_truth_and_with_a_single_draw():
    figure = plot_solution(solution_of(operators.Scale((3, 8, 8)), picture((3, 8, 8)), known=False), draws=4)
    assert set(panels(figure)) == {"Measurement", "Mean", "Standard deviation", *(f"Draw {i}" for i in range(1, 5))}
    single = plot_solution(solution_of(operators.Scale((3, 8, 8)), picture((3, 8, 8)), draws=1))
    assert set(panels(single)) == {"Measurement", "Draw 1", "Truth", "Error of the draw"}


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 64, 24), (1, 16, 64)])
@pytest.mark.parametrize("draws", [0, 3, 7])
def test_no_panel_or_label_overlaps_another(shape, draws):
    figure = plot_solution(solution_of(operators.Scale(shape), picture(shape), draws=8), draws)
    figure.canvas.draw()
    renderer, width, height = figure.canvas.get_renderer(), *figure.canvas.get_width_height()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes] + [
        t.get_window_extent(renderer) for t in figure.texts
    ]
    for i, a in enumerate(boxes):
        assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= width + 1 and a.y1 <= height + 1
        for b in boxes[i + 1 :]:
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2


@pytest.mark.parametrize(("draws", "label"), [(40, "90 % interval"), (5, "range of 5 draws")])
def test_curves_have_a_band_that_holds_the_mean(draws, label):
    t = torch.linspace(0, 6, 30).sin()
    event = (Variable(name="speed", dims=("time",), shape=(30,), units="m s-1"),)
    solution = solution_of(operators.Scale((30,)), t, draws=draws, event=event)
    (axes,) = plot_solution(solution).axes
    assert axes.get_ylabel() == "speed [m s-1]" and axes.get_xlabel() == "time"
    band = axes.collections[0]
    assert band.get_label() == label
    low = band.get_paths()[0].vertices[:, 1].min()
    assert low <= float(solution.mean().min()) and {"mean", "truth", "measurement"} <= {
        line.get_label() for line in axes.lines
    }


def test_what_cannot_be_plotted_says_so():
    solution = solution_of(operators.Scale((5, 4, 4)), picture((5, 4, 4)))
    with pytest.raises(CapabilityError, match=r"image of shape \(5, 4, 4\)"):
        plot_solution(solution)
    with pytest.raises(InputError, match="negative"):
        plot_solution(solution_of(operators.Scale((3, 8, 8)), picture((3, 8, 8))), draws=-1)


def test_pyplot_and_settings_are_left_alone():
    import sys

    before = dict(mpl.rcParams)
    had = "matplotlib.pyplot" in sys.modules
    results = []
    thread = threading.Thread(
        target=lambda: results.append(plot_solution(solution_of(operators.Scale((3, 8, 8)), picture((3, 8, 8)))))
    )
    thread.start()
    thread.join()
    assert results and dict(mpl.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == had


def test_file_is_small_and_whole_or_not_there(tmp_path):
    figure = plot_solution(solution_of(operators.Scale((3, 64, 64)), picture((3, 64, 64))))
    path = save_picture(figure, tmp_path / "a.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 400_000
    with pytest.raises(InputError, match="nowhere"):
        save_picture(figure, tmp_path / "nowhere" / "a.png")

    def fails(*args, **kwargs):
        args[0].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    figure.savefig = fails
    with pytest.raises(InputError, match="No space left"):
        save_picture(figure, tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
