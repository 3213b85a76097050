"""The simulation of tenants: what it makes of arrivals that can be counted by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
import tenants as simulation

RAW = {
    "load_cold": None,
    "load": 0.5,
    "swap": 0.01,
    "prefill": 0.001,
    "decode": {kind: {"1": 0.1, "4": 0.16} for kind in ("none", "one", "each")},
    "base_bytes": 100e6,
    "adapter_bytes": 1e6,
}
CONSTANTS = simulation.Constants(RAW)


def played(**how):
    setup = simulation.Setup(**{"tenants": 3, "requests": 60, "batch": 4, "cached": 0.0} | how)
    return simulation.simulate(setup, CONSTANTS), setup


def test_requests_that_never_meet_wait_for_their_adapter_once():
    """A hundred seconds apart: the adapter is loaded for a tenant's first request, and stays."""
    outcome, setup = played(rate=0.001, tokens=5)
    alone = setup.prompt * RAW["prefill"] + RAW["swap"] + RAW["decode"]["each"]["1"]
    waits = sorted(outcome.waits)
    assert outcome.hits == 57 and waits[:57] == pytest.approx([alone] * 57)
    assert waits[57:] == pytest.approx([alone + RAW["load"]] * 3)
    assert outcome.row(setup, CONSTANTS)[-1] == "103"


def test_fewer_slots_than_tenants_evict_and_a_cached_prompt_is_not_read_again():
    few, _ = played(rate=0.001, slots=1)
    many, _ = played(rate=0.001, slots=3)
    assert few.hits < many.hits == 57 and len(few.waits) == len(many.waits) == 60
    cached, _ = played(rate=0.001, slots=3, cached=1.0)
    assert min(cached.waits) == pytest.approx(RAW["swap"] + RAW["decode"]["each"]["1"])


def test_steps_between_measured_batches_and_every_token_is_made():
    assert [CONSTANTS.steps["each"][n] for n in (1, 2, 4)] == pytest.approx([0.1, 0.12, 0.16])
    by_name, _ = played(rate=2.0, replicas=2, sent="by name", requests=300)
    anywhere, _ = played(rate=2.0, replicas=2, sent="anywhere", requests=300)
    fused, _ = played(rate=2.0, replicas=2, fused=1, requests=300)
    assert by_name.tokens == anywhere.tokens == fused.tokens
    assert len(by_name.waits) == len(anywhere.waits) == len(fused.waits) == 300
