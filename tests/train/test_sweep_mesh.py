"""A sweep on a mesh: its members lie along an axis of devices, or their rows do, and end as on one device."""

from __future__ import annotations

from pathlib import Path

import chex
import pytest

import jlora
from tests import tiny
from tests.runs import assert_same_curve, program, records, stopping
from train.loop.stop import EXIT_CODE

MESH = "--compute.layout mesh --compute.data 4 --compute.fsdp 2"
SWEEPS = {
    "members along data": "--sweep.rank 2,3 --sweep.lr 0.01,0.003",
    "members of several batches along data": "--sweep.rank 2,3 --sweep.seed 0,1",
    "rows along data": "--sweep.lr 0.01,0.003,0.02",
    "rows of several batches along data": "--sweep.seed 0,1,2",
    "a part of the members goes on": "--sweep.rank 2,3 --sweep.lr 0.01,0.003 --sweep.halving 2",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tiny.write_sentiment(tmp_path_factory.mktemp("mesh"))


def flags(work: Path, folder: Path, *more: str) -> list[str]:
    often = "--fit.epochs 2 --eval-every-steps 4 --save.every-steps 3 --log-every 1"
    return tiny.sentiment_flags(work, folder, often, *more)


def assert_same_members(found: Path, expected: Path) -> None:
    """To 1e-5."""
    names = sorted(one.name for one in (expected / "members").iterdir())
    assert names == sorted(one.name for one in (found / "members").iterdir())
    for name in names:
        one, other = (jlora.load(folder / "members" / name / "adapters") for folder in (found, expected))
        chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
        chex.assert_trees_all_close(one, other, rtol=0, atol=1e-5)
        assert_same_curve(*(records(folder / "members" / name) for folder in (found, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_a_mesh_trains_the_members_of_one_device(work, tmp_path, kind):
    """And what was stopped on one layout ends on the other."""
    for name, layout in (("one", ""), ("mesh", MESH)):
        code, printed = program(*flags(work, tmp_path / name, SWEEPS[kind], layout))
        assert code == 0, printed
    assert_same_members(tmp_path / "mesh", tmp_path / "one")
    for first, then in (("", MESH), (MESH, "")):
        folder = tmp_path / f"stopped{len(first)}"
        with stopping(after=8):
            code, printed = program(*flags(work, folder, SWEEPS[kind], first))
        assert code == EXIT_CODE, printed
        code, printed = program(*flags(work, folder, SWEEPS[kind], then))
        assert code == 0 and "resuming " in printed, printed
        assert_same_members(folder, tmp_path / "one")
