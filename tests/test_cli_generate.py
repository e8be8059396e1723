"""``tilewise generate``: what it prints in every mode, what it compares, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from tilewise.cli.app import app


def call(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    pytest.importorskip("transformers")
    from tilewise.hf.testing import save_random_pair

    return save_random_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(places):
    """Options that name a random pair; float64, because random weights make near-ties that float32 decides freely."""
    return ("--model", places[0], "--draft", places[1], "--max-new-tokens", 24, "--dtype", "float64")


def test_generate_streams_text(pair):
    result = call("generate", "def f(", *pair)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def f(")
    assert len(result.stdout) > len("def f(") + 4
    assert "24 tokens" in result.stderr
    assert "a step of the target" in result.stderr
    assert call("generate", "-", *pair, stdin="def f(").stdout == result.stdout


def test_generate_json(pair):
    fast = json.loads(call("generate", "def f(", *pair, "--json").stdout)
    plain = json.loads(call("generate", "def f(", *pair[:2], *pair[4:], "--json").stdout)
    assert fast["tokens"] == plain["tokens"]
    assert len(fast["tokens"]) == fast["stats"]["tokens"] == 24
    assert fast["text"] == plain["text"] == bytes(fast["tokens"]).decode("utf-8", errors="replace")
    assert fast["models"]["draft"] == str(pair[3])
    assert plain["models"]["draft"] is None
    assert plain["stats"]["drafted"] == 0 < fast["stats"]["drafted"]
    assert fast["settings"]["draft_length"] == 8
    assert (fast["mode"], plain["mode"]) == ("speculative", "plain")
    left_out = json.loads(call("generate", "def f(", *pair, "--mode", "plain", "--json").stdout)
    assert left_out["models"]["draft"] is None and left_out["tokens"] == plain["tokens"]


def test_compare_reports_speed_and_identity(pair):
    result = call("generate", "def f(", *pair, "--compare")
    assert result.exit_code == 0, result.output
    for part in ("identical: yes", "speed-up: ", "plain", "speculative", "tokens a second", "draft 1"):
        assert part in result.stdout
    found = json.loads(call("generate", "def f(", *pair, "--compare", "--json", "--repeat", 2).stdout)
    assert found["identical"] is True
    assert found["first_difference"] is None
    assert found["plain"]["rounds"] == 23
    assert found["speedup"] == pytest.approx(
        found["speculative"]["tokens_per_second"] / found["plain"]["tokens_per_second"]
    )


def test_compare_does_not_expect_identity_when_sampling(pair):
    result = call("generate", "def f(", *pair, "--compare", "--temperature", 0.9, "--top-p", 0.9, "--top-k", 40)
    assert result.exit_code == 0
    assert "identical: not expected" in result.stdout
    assert "identical: yes" not in result.stdout
    found = call("generate", "def f(", *pair, "--compare", "--temperature", 0.9, "--json")
    assert json.loads(found.stdout)["identical"] is None


def test_compare_fails_if_the_tokens_differ(pair, monkeypatch):
    """The comparison must be able to say no: a verification that accepts everything is caught."""
    from tilewise.hf.generate import SpeculativeDecoder

    honest = SpeculativeDecoder._verify

    def credulous(self, drafted, *arguments):
        _, token = honest(self, drafted, *arguments)
        return len(drafted), token

    monkeypatch.setattr(SpeculativeDecoder, "_verify", credulous)
    result = call("generate", "def f(", *pair, "--compare")
    assert result.exit_code == 1
    assert "identical: no (token" in result.stdout and "of speculative differs" in " ".join(result.stdout.split())
    assert json.loads(call("generate", "def f(", *pair, "--compare", "--json").stdout)["identical"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "./no/such/place"), 1, "does not exist"),
        (("--model", "nobody/no-such-model"), 1, "Hugging Face cache"),
        (("--top-p", "0"), 1, "top_p"),
        (("--dtype", "int8"), 1, "--dtype must be one of"),
        (("--compare", "--draft", "none"), 1, "--compare needs a draft, and --draft none asks for none"),
        (("--mode", "ssd", "--draft", "none"), 1, "--mode ssd needs a draft, and --draft none asks for none"),
        (("--mode", "speculative", "--model", "X"), 1, "--model X comes without one; name one with --draft"),
        (("--compare", "--model", "X"), 1, "--model X comes without one; name one with --draft"),
        (("--mode", "plain", "--compare"), 1, "choose --mode speculative or ssd"),
        (("--mode", "sdd"), 1, "--mode must be one of plain, speculative, ssd, got 'sdd'"),
        (("--budget", "9"), 1, "--budget is of drafts made ahead, and the mode is speculative; add --mode ssd"),
        (("--fallback", "fast", "--mode", "plain"), 1, "--fallback is of drafts made ahead, and the mode is plain"),
        (("--mode", "ssd", "--fallback", "slow"), 1, "--fallback must be one of adaptive, neural, fast, got 'slow'"),
        (("--plot", "a.png"), 1, "--plot is of drafts made ahead, and the mode is speculative; add --mode ssd"),
        (("--mode", "ssd", "--plot", "a.nothing"), 1, "--plot: expected a name that ends in"),
        (("--compare", "--max-new-tokens", "0"), 1, "max_new_tokens must be at least 1, got 0"),
        (("--mode", "ssd", "--budget", "-1"), 2, "--budget"),
        (("--temperature", "-1"), 2, "temperature"),
        (("--no-such-option",), 2, "No such option"),
    ],
)
def test_errors_are_messages_and_exit_codes(arguments, code, message, pair):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    models = () if "--model" in arguments or "--draft" in arguments else pair[:4]
    result = call("generate", "x", *models, *arguments)
    assert result.exit_code == code, result.output
    # rich wraps and frames usage errors
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("generate", "x", "--mode", "ssd", "--plot", "a.png")
    assert result.exit_code == 1
    assert "pip install 'tilewise[viz]'" in result.stderr


def test_threads_are_handed_on(pair):
    from tilewise import _core

    before = _core.num_threads()
    try:
        found = json.loads(call("generate", "x", *pair, "--threads", 1, "--json").stdout)
        assert found["settings"]["threads"] == _core.num_threads() == 1
    finally:
        _core.set_num_threads(0)
    assert _core.num_threads() == before


def test_an_empty_prompt_is_refused(pair):
    result = call("generate", "", *pair)
    assert result.exit_code == 1
    assert "the prompt is empty" in result.stderr


def test_generate_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tilewise.hf.models", None)  # as an import that fails somewhere below
    result = call("generate", "x")
    assert result.exit_code == 1
    assert "pip install 'tilewise[hf]'" in result.stderr


# Drafts made ahead. Each of these starts a process for the draft, which takes seconds.

AHEAD = ("--mode", "ssd", "--draft-length", 3, "--budget", 6, "--fallback", "neural")


def test_ssd_streams_the_text_of_plain_generation_and_draws_it(pair, tmp_path):
    pytest.importorskip("matplotlib")
    result = call("generate", "def f(", *pair, *AHEAD, "--plot", tmp_path / "rounds.svg")
    assert result.exit_code == 0, result.output
    assert result.stdout == call("generate", "def f(", *pair, "--mode", "plain").stdout
    summary = " ".join(result.stderr.split())
    assert "24 tokens" in summary and "of the rounds drafted ahead" in summary
    drawn = (tmp_path / "rounds.svg").read_text()
    assert drawn.count("<svg") == 1


def test_ssd_json_has_the_stats_of_the_engine(pair):
    result = call("generate", "def f(", *pair, *AHEAD, "--json", "--temperature", 0.7, "--seed", 5)
    found = json.loads(result.stdout, parse_constant=pytest.fail)  # NaN is no JSON
    assert found["mode"] == "ssd"
    assert found["settings"]["ssd"] == {"draft_length": 3, "budget": 6, "fallback": "neural"}
    assert found["settings"]["seed"] == 5
    stats = found["stats"]
    assert stats["tokens"] == len(found["tokens"]) == 24
    histograms = stats["accepted_lengths"].values()
    assert sum(map(sum, histograms)) == stats["rounds"] == stats["scheduler"]["rounds"]
    kept = sum(k * count for each in histograms for k, count in enumerate(each))
    assert 24 <= 1 + kept + stats["rounds"] <= 24 + 3  # the prompt's token; the last round may be cut
    assert max(map(len, histograms)) <= 3 + 1
    assert stats["lost_workers"] == 0


def test_compare_ssd_with_both(pair):
    result = call("generate", "def f(", *pair, *AHEAD, "--compare", "--json", "--repeat", 2)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["identical"] is True and found["first_difference"] is None
    assert list(found["modes"]) == ["plain", "speculative", "ssd"]
    speed = {mode: found[mode]["tokens_per_second"] for mode in found["modes"]}
    for mode, figures in found["modes"].items():
        assert figures["identical"] is True
        assert figures["speedup"] == pytest.approx(speed[mode] / speed["plain"])
        assert found[mode]["tokens"] == 24  # of one run, not of two and a warm-up
    assert found["speedup"] == found["modes"]["ssd"]["speedup"]
    assert found["plain"]["rounds"] == 23
    assert found["settings"]["draft_length"] == 3 and found["settings"]["confidence"] == 0.3
    assert found["settings"]["ssd"]["budget"] == 6


def test_compare_ssd_prints_a_column_each_and_expects_nothing_of_samples(pair):
    result = call("generate", "def f(", *pair, *AHEAD, "--compare", "--temperature", 0.9, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    for part in ("plain", "speculative", "ssd", "drafted ahead (hits)", "accepted 0", "over plain", "speed-up: "):
        assert part in result.stdout
    assert "identical: not expected" in result.stdout and "identical: yes" not in result.stdout


def test_compare_fails_if_the_tokens_of_ssd_differ(pair, monkeypatch):
    """A target that errs is caught, and named; speculative decoding beside it is not."""
    from tilewise.hf.engine.rules import Coupled

    honest = Coupled.decide

    def erring(self, drafted, *arguments):
        accepted, token = honest(self, drafted, *arguments)
        return accepted, token ^ 1

    monkeypatch.setattr(Coupled, "decide", erring)
    result = call("generate", "def f(", *pair, *AHEAD, "--compare")
    assert result.exit_code == 1, result.output
    report = " ".join(result.stdout.split())
    assert "identical: no (token" in report and "of ssd differs" in report
    assert "of speculative differs" not in report and "identical: yes" not in report


def test_a_draft_that_does_not_start(pair, monkeypatch):
    """The text is the same, and a warning says why it is slow; a comparison refuses to time that."""
    from tilewise.hf.engine.drafts import Drafts

    monkeypatch.setattr(Drafts, "start", lambda self: None)
    result = call("generate", "def f(", *pair, *AHEAD)
    assert result.exit_code == 0, result.output
    assert result.stdout == call("generate", "def f(", *pair).stdout
    assert "did not start" in result.stderr
    refused = call("generate", "def f(", *pair, *AHEAD, "--compare")
    assert refused.exit_code == 1
    assert "the draft's process did not start" in refused.stderr


# What a comparison says of the runs it is given.


def run(speed, tokens):
    from tilewise.hf.compare import Run
    from tilewise.hf.generate import Stats

    return Run(tokens, Stats(tokens=len(tokens), seconds=len(tokens) / speed))


def test_comparison_takes_medians_and_looks_at_every_run():
    pytest.importorskip("transformers")
    from tilewise.errors import ArgumentError
    from tilewise.hf.compare import Comparison

    same = [7, 8, 9, 10]
    runs = {
        "plain": [run(10, same), run(40, same), run(20, same)],
        "speculative": [run(30, same), run(60, same), run(50, same)],
        "ssd": [run(70, [7, 8, 1, 10]), run(80, same), run(200, [7, 8, 9])],
    }
    found = Comparison(runs, greedy=True)
    assert found.modes == ("plain", "speculative", "ssd")
    assert [found.median(mode).stats.tokens_per_second for mode in found.modes] == pytest.approx([20, 50, 80])
    assert [found.speedup(mode) for mode in found.modes] == pytest.approx([1, 2.5, 4])
    assert [found.identical(mode) for mode in found.modes] == [True, True, False]  # though its median run is right
    assert [found.first_difference(mode) for mode in found.modes] == [None, None, 2]
    assert found.different == ("ssd",)
    shorter = Comparison({"plain": [run(1, same)], "ssd": [run(1, same[:3])]}, greedy=True)
    assert shorter.first_difference("ssd") == 3
    sampled = Comparison(runs, greedy=False)
    assert sampled.identical("ssd") is sampled.first_difference("ssd") is None and sampled.different == ()
    for ask in (found.median, found.speedup, found.identical, found.first_difference):
        with pytest.raises(ArgumentError, match=r"mode: expected one of 'plain', 'speculative', 'ssd', got 'fast'"):
            ask("fast")
