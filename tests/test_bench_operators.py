"""The benchmark of operators on tiny batches: all libraries do the same, and the files hold what was timed."""

import json
import warnings

import pytest
import torch

from invdiff.bench import operators, operators_rows
from invdiff.bench.operators_table import table
from invdiff.errors import InputError, ShapeError

CPU = torch.device("cpu")


def test_rows_do_what_their_peers_do():
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("inpainting", "high dynamic range", "Gaussian blur 23, reflect", "down-sampling 4, bicubic"):
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # deepinv's own
                shape, entries = operators_rows.row(name, 32, CPU)
            x = torch.rand(2, *shape, generator=generator)
            ours, ours_gradient = entries["invdiff"].calls["gradient"](x)
            for library, entry in entries.items():
                if library == "deepinv" and name.startswith("down"):
                    continue  # its boundary is another
                value, gradient = entry.calls["gradient"](x)
                torch.testing.assert_close(gradient, ours_gradient, rtol=1e-3, atol=1e-2)
                # Without the constant, which the others leave out.
                torch.testing.assert_close(value.diff(), ours.diff(), rtol=1e-3, atol=1e-2)
    with pytest.raises(ShapeError, match="too large"):
        operators_rows.row("motion blur 61, valid", 32, CPU)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ptwt's own
def test_wavelets_of_all_libraries_are_the_same():
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in operators_rows.names() if n.startswith("wavelets")]:
        shape, entries = operators_rows.row(name, 20, CPU)
        assert set(entries) == {"invdiff", "PyWavelets", "ptwt"}
        x = torch.randn(2, *shape, generator=generator)
        ours = entries["invdiff"].calls["forward"](x)
        for entry in entries.values():
            torch.testing.assert_close(entry.calls["forward"](x), ours, rtol=1e-4, atol=1e-5)


def test_files_hold_what_was_timed(tmp_path, capsys):
    out, page, figure = tmp_path / "o.json", tmp_path / "o.md", tmp_path / "o.png"
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        operators.main(
            f"--out {out} --device cpu --sizes 16 24 --batches 1 2 --rows inpainting valid --seconds 0 --table {page} "
            f"--plot {figure}".split()
        )
    report = json.loads(out.read_text())
    done = {(c["size"], c["batch"], c["call"]) for c in report["cells"] if c["row"] == "inpainting"}
    assert done == {(s, b, c) for s in (16, 24) for b in (1, 2) for c in operators_rows.CALLS}
    assert all(t > 0 for c in report["cells"] for t in [*c["median_us"].values(), *c["least_us"].values()])
    assert all(c["least_us"][k] <= v for c in report["cells"] for k, v in c["median_us"].items())
    assert len(report["left_out"]) == 4
    assert all("too large" in line for line in report["left_out"]), "a kernel of 61 pixels does not fit"
    assert report["versions"]["torch"] == torch.__version__
    text = page.read_text()
    assert "### 24 x 24, batch 2" in text
    assert text.count("| inpainting | proximal step |") == 4
    assert figure.stat().st_size > 5000
    page.unlink()
    operators.main(f"--out {out} --report --table {page}".split())
    assert page.read_text() == text == table(report)
    assert "inpainting, 16, batch 1" in capsys.readouterr().out


def test_a_deadline_stops_it(tmp_path):
    out = tmp_path / "o.json"
    operators.main(f"--out {out} --device cpu --sizes 16 --batches 1 --rows inpainting --deadline -1".split())
    report = json.loads(out.read_text())
    assert report["cells"] == []
    assert report["left_out"] == ["inpainting, 16, batch 1: the deadline passed"]


def test_files_of_one_device_are_joined(tmp_path):
    parts = [tmp_path / "0.json", tmp_path / "1.json"]
    for part, size in zip(parts, (16, 24), strict=True):
        words = f"--out {part} --device cpu --sizes {size} --batches 1 --rows inpainting --calls forward --seconds 0.01"
        operators.main(words.split())
    out, page = tmp_path / "o.json", tmp_path / "t.md"
    operators.main(f"--merge {parts[0]} {parts[1]} --out {out} --sizes 24 --table {page}".split())
    assert [c["size"] for c in json.loads(out.read_text())["cells"]] == [16, 24]
    assert "### 24 x 24, batch 1" in page.read_text()
    assert "### 16 x 16" not in page.read_text()
    parts[1].write_text(json.dumps(json.loads(parts[1].read_text()) | {"device": "another"}))
    with pytest.raises(InputError, match="differ in device"):
        operators.main(f"--merge {parts[0]} {parts[1]} --out {out}".split())
