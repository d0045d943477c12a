"""Every common check has a mechanism that is broken in just that way, and catches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch

from foveate.core import fused, rows
from foveate.core.accumulate import Estimate
from foveate.core.card import Card, Needs
from foveate.core.errors import UnknownName
from foveate.core.mask import Mask
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Metric, ModelMetric, Pattern, RowMetric, Visits
from foveate.core.params import bounded, choice
from foveate.core.places import some_indices
from foveate.core.reductions import ColumnMass, Distance, Match, RowEntropy, Sample
from foveate.core.registry import find
from foveate.core.rule import Rule
from foveate.testing import CheckFailed, check_mechanism, checks, checks_for

BROKEN: list[tuple[str, type[Mechanism]]] = []


def breaks(check: str) -> Callable[[type], type]:
    """Marks a mechanism as one that this check must catch."""

    def note(cls: type) -> type:
        BROKEN.append((check, cls))
        return cls

    return note


def card(needs: Needs = Needs.WEIGHTS) -> Card:
    return Card("a test", 2026, "test", needs, "none", "nothing known", "in tests")


# ---------------------------------------------------------------- sound ones, which the broken ones vary


class Sound(RowMetric):
    """Mean entropy under the metric's own name."""

    card: ClassVar = card()

    def needs(self):
        return (RowEntropy(),)

    def number(self, rows):
        return rows[RowEntropy()]

    def per_row(self, rows):
        return {self.name: self.number(rows)}


@dataclass(frozen=True)
class SoundMetric(Sound):
    """Entropy, with parameters of every kind."""

    whole: int = bounded(3, 0, 9)
    real: float = bounded(0.5, 0.0, 1.0)
    many: tuple[int, ...] = bounded((1, 2), 0, 9)
    word: str = choice("mean", "mean", "sum")


@dataclass(frozen=True)
class SoundSampled(Metric):
    """Mean of the largest weight of one row of each sampled pair."""

    card: ClassVar = card()

    def needs(self):
        return (Sample(4),)

    def start(self, layer):
        return []

    def update(self, state, rows):
        sample = rows[Sample(4)]
        real = rows.view.mask.rows.expand(rows.view.batch, -1)[:, sample.index][:, None]
        peak = sample.weights.amax(-1)
        total = torch.where(real, peak, 0.0).sum((0, 2))
        return [*state, (total, real.sum((0, 2)))]

    def result(self, state):
        value = sum(t for t, _ in state) / sum(n for _, n in state)
        nan = torch.full_like(value, torch.nan)
        return {self.name: Estimate(value.double(), nan.double(), nan.double())}


class Warmer(Edit):
    """Divides the scores by a temperature."""

    card: ClassVar = card()

    def edit_scores(self, block, scores):
        return scores / 1.7


@dataclass(frozen=True)
class SoundEdit(Warmer):
    """A temperature that can be set."""

    temperature: float = bounded(1.7, 0.1, 10.0)
    identity: ClassVar = {"temperature": 1.0}
    test_params: ClassVar = ({}, {"temperature": 0.6}, {"temperature": 1.0})

    def edit_scores(self, block, scores):
        return scores / self.temperature


@dataclass(frozen=True)
class SoundHeadEdit(HeadEdit):
    """Multiplies the outputs of every other head; of all of them, a norm behind the projection takes it back."""

    by: float = bounded(0.5, -2.0, 2.0)
    card: ClassVar = card()
    identity: ClassVar = {"by": 1.0}

    def edit(self, rows, out):
        new = out.clone()
        new[:, ::2] *= self.by
        return new


class Near(Pattern):
    """The key block that a row stands in, and the one before."""

    card: ClassVar = card()

    def select(self, view):
        at = view.mask.position[:, None] // 4
        near = (at - torch.arange(-(-view.keys // 4))).abs() <= 1
        return Visits(near[None, None], 1, 4)


@dataclass(frozen=True)
class SoundPattern(Near):
    """Blocks of four keys, two of them visited.

    Blocks are counted from the first key of the call, padding included.
    """

    known_failures: ClassVar = {"padding": "blocks of keys are counted from the first key, padding included"}


def one_table(model: Any, name: str) -> pd.DataFrame:
    heads = model.config.num_attention_heads
    table = pd.DataFrame({"layer": 0, "head": range(heads), "metric": name, "value": 1.0, "low": 0.5, "high": 1.5})
    return table[checks.COLUMNS]


@dataclass(frozen=True)
class SoundModelMetric(ModelMetric):
    """Says one for every head of the first layer."""

    card: ClassVar = card(Needs.MODEL)

    def measure(self, model, tokenizer):
        return one_table(model, self.name)


SOUND = (SoundMetric, SoundSampled, SoundEdit, SoundHeadEdit, SoundPattern, SoundModelMetric)


@pytest.mark.parametrize(("cls", "check"), [(c, n) for c in SOUND for n in checks_for(c)])
def test_sound_mechanisms_pass(cls: type[Mechanism], check: str) -> None:
    assert check_mechanism(cls, only=[check]) == [check]


# ---------------------------------------------------------------- what it says of itself


@breaks("form")
@dataclass(frozen=True)
class OtherLabel(Sound):
    """Its label is not its name."""

    def per_row(self, rows):
        return {"entropy": self.number(rows)}


@breaks("form")
@dataclass(frozen=True)
class NoCard(HeadEdit):
    """Has no card."""

    def edit(self, rows, out):
        return out * 2


@breaks("form")
@dataclass(frozen=True)
class NoDocstring(ModelMetric):
    card: ClassVar = card()

    def measure(self, model, tokenizer):
        return one_table(model, self.name)


@breaks("form")
class NoDataclass(Sound):
    """Is a subclass of a dataclass, and none itself."""


@breaks("bounds")
@dataclass(frozen=True)
class BoundsOnPaper(Sound):
    """Declares bounds and does not check them."""

    width: int = bounded(3, 0, 9)

    def __post_init__(self):
        pass


@breaks("bounds")
@dataclass(frozen=True)
class BoundsOnPaperEdit(Warmer):
    """Clips instead of refusing."""

    width: float = bounded(0.5, 0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "width", 0.5)


@breaks("bounds")
@dataclass(frozen=True)
class WrongError(ModelMetric):
    """Refuses with an error that is not ours."""

    width: int = bounded(3, 0, 9)
    card: ClassVar = card()

    def __post_init__(self):
        if not isinstance(self.width, int) or not 0 <= self.width <= 9 or self.width is True:
            raise ValueError("width")

    def measure(self, model, tokenizer):
        return one_table(model, self.name)


@breaks("declares")
@dataclass(frozen=True)
class AsksTooMuch(Sound):
    """Asks for a reduction that it never reads."""

    def needs(self):
        return RowEntropy(), Distance()


@breaks("declares")
@dataclass(frozen=True)
class AsksTooLittle(Sound):
    """Reads what it did not ask for."""

    def number(self, rows):
        return rows[RowEntropy()] + rows[Distance()]


@breaks("declares")
@dataclass(frozen=True)
class EditAsksTooMuch(Warmer):
    """Pays for a first pass and does not use it."""

    def needs(self):
        return (ColumnMass(),)


@breaks("card_needs")
@dataclass(frozen=True)
class SecretValues(Sound):
    """Looks at the values, which its card does not say."""

    def number(self, rows):
        return rows[RowEntropy()] + rows.out.norm(dim=-1)


@breaks("card_needs")
@dataclass(frozen=True)
class SecretTokens(Sound):
    """Looks at the token ids."""

    def needs(self):
        return RowEntropy(), Match("token")

    def number(self, rows):
        return rows[RowEntropy()] + rows[Match("token")]


@breaks("card_needs")
@dataclass(frozen=True)
class SecretWeights(Sound):
    """Looks at the output projection."""

    def number(self, rows):
        return rows[RowEntropy()] * rows.view.projection.norm()


# ---------------------------------------------------------------- one truth


@breaks("reference")
@dataclass(frozen=True)
class ByEngine(Sound):
    """Says something else where the fast way was taken."""

    def number(self, rows):
        return rows[RowEntropy()] + 0.01 * (rows.engine == "fused")


@breaks("reference")
@dataclass(frozen=True)
class ByBlock(Edit):
    """Divides by the largest weight of the block, which depends on how rows are cut into blocks."""

    card: ClassVar = card()

    def edit(self, block, weights):
        return weights / weights.amax((-1, -2), keepdim=True).clamp_min(1e-6)


@breaks("reference")
@dataclass(frozen=True)
class ByPasses(SoundEdit):
    """Forgets the temperature where passes over the keys can say the outputs."""

    def through(self, passes):
        return passes.softmax().out


@breaks("gradients")
@dataclass(frozen=True)
class CutsGradients(Edit):
    """Cuts the gradient of its scores."""

    card: ClassVar = card()

    def edit_scores(self, block, scores):
        return scores.detach() * 0.5


@breaks("gradients")
@dataclass(frozen=True)
class SteepRoot(HeadEdit):
    """A root whose derivative at zero is infinite."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out * (out * 0).sum(-1, keepdim=True).sqrt() + out * 2


@breaks("repeatable")
@dataclass(frozen=True)
class Dice(Sound):
    """Draws from the global random numbers."""

    def number(self, rows):
        return rows[RowEntropy()] + 1e-6 * torch.rand(())


@breaks("repeatable")
@dataclass(frozen=True)
class DiceEdit(HeadEdit):
    """Adds noise."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out + torch.randn_like(out)


@breaks("grouped")
@dataclass(frozen=True)
class CountsGroups(Sound):
    """Depends on how many heads share a key."""

    def number(self, rows):
        return rows[RowEntropy()] * rows.view.kv_heads


@breaks("grouped")
@dataclass(frozen=True)
class CountsGroupsEdit(Edit):
    """Weighs by the size of the group."""

    card: ClassVar = card()

    def edit(self, block, weights):
        return weights / block.view.grouped


@breaks("dtypes")
@dataclass(frozen=True)
class NeedsNumpy(Sound):
    """Goes through numpy, which has no bfloat16."""

    def number(self, rows):
        return rows[RowEntropy()] + float(rows.view.q.numpy().mean())


@breaks("dtypes")
@dataclass(frozen=True)
class OneDtype(HeadEdit):
    """Mixes with a float32 matrix."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out @ torch.eye(out.shape[-1])


# ---------------------------------------------------------------- nothing leaks


@breaks("padding")
@dataclass(frozen=True)
class PadsInPicture(Sound):
    """Its picture per head begins at the first key, padding or not."""

    def start(self, layer):
        return {}, []

    def update(self, state, rows):
        state[1].append(torch.where(rows.view.mask.rows[:, None], rows[RowEntropy()], 0.0).sum(0))
        return RowMetric.update(self, state[0], rows), state[1]

    def result(self, state):
        return RowMetric.result(self, state[0])

    def arrays(self, state):
        return {f"{self.name}_course": torch.cat(state[1], -1)}


@breaks("padding")
@dataclass(frozen=True)
class CountsPads(Sound):
    """Averages over padded queries too."""

    def counted(self, rows):
        return torch.ones(1, rows.view.queries, dtype=torch.bool)


@breaks("padding")
@dataclass(frozen=True)
class FromTheLeft(Edit):
    """Counts positions from the first key, padding included."""

    card: ClassVar = card()

    def edit(self, block, weights):
        return weights / (1 + block.view.mask.position[block.index])[:, None]


@breaks("batch")
@dataclass(frozen=True)
class ComparesTexts(Sound):
    """Subtracts the mean over the batch."""

    def number(self, rows):
        return rows[RowEntropy()] - rows[RowEntropy()].mean(0)


@breaks("batch")
@dataclass(frozen=True)
class MixesTexts(HeadEdit):
    """Mixes the texts of a batch."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out + out.mean(0)


@breaks("causal")
@dataclass(frozen=True)
class SeesTheFuture(Sound):
    """Looks at all keys of the call."""

    card: ClassVar = card(Needs.WEIGHTS | Needs.KEYS)

    def number(self, rows):
        return rows[RowEntropy()] + rows.view.k.mean()


@breaks("causal")
@dataclass(frozen=True)
class SeesTheFutureEdit(Edit):
    """Scales by the mean of all keys."""

    card: ClassVar = card()

    def edit_scores(self, block, scores):
        return scores * (1 + block.view.k.mean())


@breaks("poison")
@dataclass(frozen=True)
class ReadsGarbage(Sound):
    """Multiplies by zero what nobody may see."""

    def number(self, rows):
        return rows[RowEntropy()] + 0 * rows.view.k.sum()


@breaks("poison")
@dataclass(frozen=True)
class ReadsGarbageEdit(HeadEdit):
    """Adds nothing, from garbage."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out + 0 * rows.view.v.sum()


@breaks("observing")
@dataclass(frozen=True)
class WritesOut(Sound):
    """Scales the head outputs in place."""

    def number(self, rows):
        rows.out.mul_(2)
        return rows[RowEntropy()]


@breaks("observing")
@dataclass(frozen=True)
class WritesReduction(Sound):
    """Writes to a reduction that other metrics read too."""

    def number(self, rows):
        return rows[RowEntropy()].mul_(2)


# ---------------------------------------------------------------- however the rows come in


@breaks("chunks")
@dataclass(frozen=True)
class PlaceInTheCall(Sound):
    """Takes a row's place in the call for its place in the text."""

    def number(self, rows):
        return rows[RowEntropy()] * torch.arange(rows.view.queries)


@breaks("chunks")
@dataclass(frozen=True)
class PlaceInTheCallEdit(Edit):
    """The same, in an edit."""

    card: ClassVar = card()

    def edit(self, block, weights):
        return weights / (1 + block.index)[:, None]


@breaks("decode")
@dataclass(frozen=True)
class OnlyPrefill(Sound):
    """Skips calls of a single row."""

    def counted(self, rows):
        return rows.view.mask.rows & (rows.view.queries > 1)


@breaks("decode")
@dataclass(frozen=True)
class OnlyPrefillEdit(HeadEdit):
    """Acts on the prompt only."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out * 2 if rows.view.queries > 1 else out


@breaks("lengths")
@dataclass(frozen=True)
class DividesByOthers(Sound):
    """Divides by the number of other rows."""

    def number(self, rows):
        return (1 + rows[RowEntropy()]) / (rows.view.queries - 1)


@breaks("lengths")
@dataclass(frozen=True)
class NeverFinite(Sound):
    """Says nothing but NaN."""

    def number(self, rows):
        return rows[RowEntropy()] * torch.nan


@breaks("lengths")
@dataclass(frozen=True)
class Renormalises(Edit):
    """Divides by the sum of a row, which may be zero."""

    card: ClassVar = card()

    def edit(self, block, weights):
        return weights.square() / weights.square().sum(-1, keepdim=True)


# ---------------------------------------------------------------- those that act


@breaks("identity")
@dataclass(frozen=True)
class NotTheIdentity(HeadEdit):
    """Its declared identity is none."""

    by: float = bounded(0.5, -2.0, 2.0)
    card: ClassVar = card()
    identity: ClassVar = {"by": 0.99}

    def edit(self, rows, out):
        return out * self.by


@breaks("landing")
@dataclass(frozen=True)
class NeverLands(Edit):
    """Computes new weights and returns the old ones."""

    card: ClassVar = card()

    def edit(self, block, weights):
        _ = weights / 2
        return weights


@breaks("detaching")
@dataclass(frozen=True)
class LeavesTraces(Sound):
    """Writes to the weights of the model."""

    def number(self, rows):
        rows.view.projection.mul_(1.01)
        return rows[RowEntropy()]


@breaks("detaching")
@dataclass(frozen=True)
class LeavesTracesEdit(HeadEdit):
    """Writes to the weights of the model."""

    card: ClassVar = card()

    def edit(self, rows, out):
        rows.view.projection.data.mul_(1.01)
        return out


@breaks("trial")
@dataclass(frozen=True)
class OnlyWithoutWindow(Edit):
    """Says that it acts in layer 0, and leaves layers with a sliding window alone."""

    layers: tuple[int, ...] = some_indices()
    card: ClassVar = card()
    test_params: ClassVar = ({"layers": (0,)},)

    def edit_scores(self, block, scores):
        return scores if int(block.view.mask.low.max()) > 0 else scores / 2


@breaks("on_models")
@dataclass(frozen=True)
class CountsPaddedTokens(HeadEdit):
    """Fades the head outputs with the number of keys, padding included."""

    card: ClassVar = card()

    def edit(self, rows, out):
        return out / rows.view.keys


@breaks("full")
@dataclass(frozen=True)
class ForgetsTheLastBlock(Pattern):
    """Counts whole blocks only."""

    card: ClassVar = card()

    def select(self, view):
        return Visits(torch.ones(1, 1, max(1, view.queries // 4), max(1, view.keys // 4), dtype=torch.bool), 4, 4)


# ---------------------------------------------------------------- those that run the model


@breaks("table")
@dataclass(frozen=True)
class OtherColumns(ModelMetric):
    """A table that nobody else can read."""

    card: ClassVar = card()

    def measure(self, model, tokenizer):
        return one_table(model, self.name).rename(columns={"value": "score"})


@breaks("table")
@dataclass(frozen=True)
class SaysItTwice(ModelMetric):
    """Each row stands there twice."""

    card: ClassVar = card()

    def measure(self, model, tokenizer):
        return pd.concat([one_table(model, self.name)] * 2, ignore_index=True)


@breaks("table")
@dataclass(frozen=True)
class ChangesTheModel(ModelMetric):
    """Writes to the model."""

    card: ClassVar = card()

    def measure(self, model, tokenizer):
        next(model.parameters()).data.mul_(2)
        return one_table(model, self.name)


# ---------------------------------------------------------------- they are caught


@pytest.mark.parametrize(("check", "cls"), BROKEN, ids=[f"{c}-{m.__name__}" for c, m in BROKEN])
def test_broken_mechanisms_are_caught(check: str, cls: type[Mechanism]) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_mechanism(cls, only=[check])
    assert cls.__name__ in str(caught.value)
    assert repr(check) in str(caught.value)


FAMILIES = {"metrics": (Metric,), "acting": (Edit, HeadEdit, Pattern), "model metrics": (ModelMetric,)}


@pytest.mark.parametrize(
    ("check", "family"),
    [(c.name, f) for c in checks.CHECKS.values() for f, kinds in FAMILIES.items() if set(c.kinds) & set(kinds)],
)
def test_every_check_has_been_seen_to_fail(check: str, family: str) -> None:
    assert [cls for name, cls in BROKEN if name == check and issubclass(cls, FAMILIES[family])]


def test_a_failure_names_mechanism_check_parameters_and_numbers() -> None:
    with pytest.raises(CheckFailed, match=r"NotTheIdentity\(by=0\.5\): check 'identity': .* is \S+ instead of \S+"):
        check_mechanism(NotTheIdentity(), only=["identity"])


# ---------------------------------------------------------------- broken engines are caught too


def test_a_wrong_closed_form_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.Forms.entropy
    monkeypatch.setattr(fused.Forms, "entropy", lambda self: right(self) + 0.01)
    with pytest.raises(CheckFailed, match="engine 'fused' against the reference"):
        check_mechanism(find("entropy"), only=["reference"])


def test_a_wrong_start_of_the_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mask, "starts", property(lambda self: torch.zeros_like(self.low)))
    with pytest.raises(CheckFailed, match="against the row alone"):
        check_mechanism(find("first_token_mass"), only=["padding"])


def test_counting_padded_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mask, "rows", property(lambda self: self.high > self.low))
    with pytest.raises(CheckFailed, match="right_padded"):
        check_mechanism(find("entropy"), only=["padding"])


def test_a_leaking_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(self, rows, first, last):
        return torch.zeros(1, 1, len(rows), last - first)

    monkeypatch.setattr(Mask, "allowed", lambda *args: leaks(*args) == 0)
    with pytest.raises(CheckFailed):
        check_mechanism(SoundEdit, only=["causal"])


def test_wrongly_grouped_heads_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rule.score

    def shuffled(self, block):
        s = right(self, block)
        return s.roll(1, 1) if block.view.grouped > 1 else s

    monkeypatch.setattr(Rule, "score", shuffled)
    with pytest.raises(CheckFailed, match="grouped against repeated"):
        check_mechanism(SoundEdit, only=["grouped"])


def test_a_scale_that_is_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.sdpa

    def forgets(view):
        return right(view) * 1.01

    monkeypatch.setattr(rows, "sdpa", forgets)
    with pytest.raises(CheckFailed, match="observed against plain attention"):
        check_mechanism(find("output_norm"), only=["observing"])


# ---------------------------------------------------------------- declared failures


def test_a_declared_failure_is_allowed() -> None:
    @dataclass(frozen=True)
    class Declared(CountsPads):
        """Says that it counts padding."""

        known_failures: ClassVar = {"padding": "counts padded queries on purpose"}

    assert "padding" in check_mechanism(Declared, only=["padding"])


def test_a_declared_failure_that_passes_is_an_error() -> None:
    @dataclass(frozen=True)
    class Modest(SoundMetric):
        """Claims a failure that it does not have."""

        known_failures: ClassVar = {"padding": "it was broken once"}

    with pytest.raises(CheckFailed, match=r"declared a known failure.*it was broken once"):
        check_mechanism(Modest, only=["padding"])


def test_a_declared_failure_of_no_check_is_an_error() -> None:
    @dataclass(frozen=True)
    class Misspelt(SoundMetric):
        """Declares a check that does not exist."""

        known_failures: ClassVar = {"paddding": "a slip"}

    with pytest.raises(UnknownName, match="did you mean 'padding'"):
        check_mechanism(Misspelt)


def test_unknown_checks_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'chunks'"):
        check_mechanism(SoundMetric, only=["chunk"])
    with pytest.raises(UnknownName):
        check_mechanism(SoundMetric, only=["landing"])


def test_every_setting_is_tried() -> None:
    @dataclass(frozen=True)
    class SecondIsBroken(Sound):
        """Breaks at its second setting only."""

        wide: int = bounded(0, 0, 1)
        test_params: ClassVar = ({}, {"wide": 1})

        def number(self, rows):
            return rows[RowEntropy()] + self.wide * rows.view.k.mean()

    with pytest.raises(CheckFailed, match="wide=1"):
        check_mechanism(SecondIsBroken, only=["causal"])
    assert check_mechanism(SecondIsBroken(), only=["causal"]) == ["causal"]


def test_the_list_of_checks_depends_on_the_kind() -> None:
    assert "observing" in checks_for(Metric)
    assert "observing" not in checks_for(Edit)
    assert "full" in checks_for(SoundPattern())
    assert checks_for(ModelMetric) == ["form", "bounds", "table"]
