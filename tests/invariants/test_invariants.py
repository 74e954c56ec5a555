"""Every check of this folder holds, and fails under each of its mutants.

A check is a function `check_…` that asserts. A mutant is a function that breaks the library through monkeypatch. A file
lists in `MUTANTS` the mutants that each of its checks must catch.
"""

from importlib import import_module
from pathlib import Path

import pytest
from helpers import assert_caught

FILES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p != Path(__file__))
pytest.register_assert_rewrite(*(f"invariants.{name}" for name in FILES))
MODULES = [import_module(f"invariants.{name}") for name in FILES]


def _case(module, *functions):
    names = [Path(module.__file__).stem, *(f.__name__ for f in functions)]
    return pytest.param(*functions, id="-".join(names), marks=getattr(module, "pytestmark", ()))


@pytest.mark.parametrize("check", [_case(m, check) for m in MODULES for check in m.MUTANTS])
def test_invariant(check):
    check()


@pytest.mark.parametrize(
    "check, mutant",
    [_case(m, check, mutant) for m in MODULES for check, mutants in m.MUTANTS.items() for mutant in mutants],
)
def test_mutant_is_caught(check, mutant, monkeypatch):
    assert_caught(check, mutant, monkeypatch)


@pytest.mark.parametrize("module", MODULES, ids=FILES)
def test_all_checks_are_listed_with_a_mutant(module):
    assert set(module.MUTANTS) == {f for name, f in vars(module).items() if name.startswith("check_")}
    assert all(module.MUTANTS.values())


def test_every_wrong_version_that_the_audit_shows_is_caught():
    versions = set(import_module("audit_versions").MUTANTS)  # of scripts/, which invariants.audit can import
    assert versions <= {
        m.__wrapped__ for mutants in import_module("invariants.audit").MUTANTS.values() for m in mutants
    }
