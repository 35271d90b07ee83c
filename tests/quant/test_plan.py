import json
from pathlib import Path

import pytest

from stepquant.core.grid import Grid
from stepquant.errors import PlanError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan, Rule, all_sites
from stepquant.quant.schemes import INNER, SCHEMES, scheme
from tests.models.tiny import CASES

REST = Rule(None, "everything else")


@pytest.mark.parametrize("case", CASES)
def test_every_scheme_decides_every_site_of_every_model(case: str) -> None:
    denoiser = Denoiser(CASES[case]()[0])
    for name in SCHEMES:
        check(name, denoiser)


def check(name: str, denoiser: Denoiser) -> None:
    decisions = scheme(name).resolve(denoiser)
    assert set(decisions) == {(path, port) for path, _, port in all_sites(denoiser)}
    assert all(decision.reason for decision in decisions.values())
    weights = {d.path: d.grid for d in decisions.values() if d.port == "weight"}
    without = {path for path, grid in weights.items() if grid is None}
    assert without == set(weights) & set(denoiser.stays_float()), "weights of all schemes are integers"


@pytest.mark.parametrize(
    ("name", "path", "port", "words"),
    [
        ("sana", "transformer_blocks.0.attn1", "query", "linear attention"),
        ("waveform", "mid_block.attentions.0", "probabilities", "by itself"),
        ("plan_of_actions", "up_blocks.0.upsample.conv", "weight", "transposed"),
    ],
)
def test_what_has_no_integer_form_stays_float_and_says_why(
    name: str, path: str, port: str, words: str
) -> None:
    decision = scheme("w8a8").resolve(Denoiser(CASES[name]()[0]))[path, port]
    assert decision.grid is None
    assert words in decision.reason


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("plain", ("down_blocks.0", "up_blocks.1")),
        ("class_transformer", ("transformer_blocks.0", "transformer_blocks.2")),
        ("flux", ("transformer_blocks.0", "single_transformer_blocks.1")),
    ],
)
def test_named_schemes_keep_the_first_and_the_last_block_in_eight_bits(
    name: str, ends: tuple[str, str]
) -> None:
    denoiser = Denoiser(CASES[name]()[0])
    assert denoiser.ends() == ends
    decisions = [one for one in scheme("w4a4").resolve(denoiser).values() if one.role in INNER]
    assert decisions
    for one in decisions:
        assert one.grid
        assert (one.grid.bits == 8) == one.path.startswith(tuple(f"{block}." for block in ends)), one.path
    assert all(one.grid is None or one.grid.bits == 8 for one in scheme("w8a8").resolve(denoiser).values())


def test_a_rule_for_the_ends_is_read_again_from_its_file() -> None:
    rule = Rule(Grid.parse("int8/channel"), "mine", ports=("weight",), ends=True)
    assert Rule.from_json(rule.to_json()) == rule
    assert "ends" not in REST.to_json()


def test_first_match_wins() -> None:
    denoiser = Denoiser(CASES["plain"]()[0])
    eight, four = Grid.parse("int8/channel"), Grid.parse("int4/channel")
    plan = Plan(
        "mine",
        (
            Rule(eight, "first", path="conv_in", ports=("weight",)),
            Rule(four, "rest", ports=("weight",)),
            REST,
        ),
    )
    decisions = plan.resolve(denoiser)
    assert decisions["conv_in", "weight"].grid == eight
    assert decisions["conv_out", "weight"].grid == four
    assert decisions["conv_in", "input"].grid is None


def test_a_rule_without_effect_is_an_error() -> None:
    denoiser = Denoiser(CASES["plain"]()[0])
    with pytest.raises(PlanError, match="rule 0 .* no effect"):
        Plan("mine", (Rule(None, "typo", path="conv_inn"), REST)).resolve(denoiser)
    with pytest.raises(PlanError, match="rule 1 .* no effect"):
        Plan("mine", (REST, Rule(None, "shadowed", path="conv_in"))).resolve(denoiser)
    Plan("mine", (Rule(None, "may be absent", roles=("context",), optional=True), REST)).resolve(denoiser)


def test_an_undecided_site_is_an_error() -> None:
    with pytest.raises(PlanError, match="no rule of plan 'mine'"):
        Plan("mine", (Rule(None, "weights", ports=("weight",)),)).resolve(Denoiser(CASES["plain"]()[0]))


def test_activations_carry_one_scale_per_tensor() -> None:
    plan = Plan("mine", (Rule(Grid.parse("int8/channel"), "wrong", ports=("input",)), REST))
    with pytest.raises(PlanError, match="cannot carry int8/channel"):
        plan.resolve(Denoiser(CASES["plain"]()[0]))


def test_operands_of_attention_have_scales_by_the_token_together() -> None:
    denoiser = Denoiser(CASES["text_to_image"]()[0])
    part = Rule(Grid.parse("int8/token"), "a part", ("product",), ("query", "key"))
    others = Rule(Grid.parse("uint8/tensor/sym"), "the others", ("product",))
    with pytest.raises(PlanError, match="a part of the operands"):
        Plan("mine", (part, others, REST)).resolve(denoiser)
    signed = Rule(Grid.parse("int8/token"), "signed", ("product",), ("probabilities",))
    with pytest.raises(PlanError, match="cannot carry int8/token"):
        Plan("mine", (signed, others, REST)).resolve(denoiser)


def test_plan_files(tmp_path: Path) -> None:
    plan = scheme("w4a8")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    assert Plan.read(file) == plan
    file.write_text('{"rules": [{"grid": "int8/channel", "role": "conv"}]}')
    with pytest.raises(UnknownNameError, match="roles"):
        Plan.read(file)
    file.write_text("{")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.read(file)
    file.write_text("[]")
    with pytest.raises(PlanError, match="rules"):
        Plan.read(file)


def test_unknown_scheme_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="w4a8"):
        scheme("w4a9")


def test_groups_must_divide_the_inputs() -> None:
    plan = Plan("mine", (Rule(Grid.parse("int4/group5"), "wrong", ("conv",), ("weight",)), REST))
    with pytest.raises(PlanError, match="groups of 5 do not divide"):
        plan.resolve(Denoiser(CASES["plain"]()[0]))


def test_an_unreadable_grid_in_a_plan_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"rules": [{"grid": "int9/channel"}]}')
    with pytest.raises(PlanError, match="2 to 8 bits"):
        Plan.read(tmp_path / "plan.json")
