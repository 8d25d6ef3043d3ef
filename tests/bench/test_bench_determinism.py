"""`repro bench determinism`: the same again is bitwise equal, another seed is not, and each difference is measured."""

from repro.bench import determinism


def test_the_same_again_is_equal_and_another_seed_is_not(monkeypatch):
    """In this process, for speed; each case has one of its own otherwise."""
    monkeypatch.setattr(determinism, "_run", lambda settings, environment: determinism.one(settings))
    wanted = [number for number, case in enumerate(determinism.CASES) if case[0] in ("stopped", "seed")]
    found = determinism.measure(steps=20, cases=wanted)
    stopped, seed = found["cases"]
    assert (stopped["bitwise"], stopped["largest"]) == (True, 0.0)
    assert not seed["bitwise"]
    assert seed["largest"] >= seed["first"] > 0.001
    assert found["steps"] == 20
