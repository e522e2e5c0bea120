"""The benchmark of large ensembles runs, and writes what it says."""

import json

from invdiff.bench.ensembles import main


def test_a_run_writes_its_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    table = tmp_path / "rows.md"
    main(
        [
            "--out",
            str(out),
            "--table",
            str(table),
            "--device",
            "cpu",
            "--particles",
            "2",
            "4",
            "--steps",
            "1",
            "--batch",
            "2",
        ]
    )
    report = json.loads(out.read_text())
    assert [r["particles"] for r in report["rows"]] == [2, 4]
    for row in report["rows"]:
        assert row["processes"] == 1
        assert row["evaluations"] == 5  # one step of Euler and four refreshes
        assert min(row["seconds"], row["network_seconds"], row["over_network"]) > 0
    assert f"| 4 | 1 | 5 | {report['rows'][1]['seconds']:.2f} |" in table.read_text()
    assert len(capsys.readouterr().out.splitlines()) == 2
