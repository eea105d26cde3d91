"""A residual as a user writes it, in a file of its own: LayerScale (arXiv 2103.17239)."""

from pydantic import Field

from attnres_train.config.section import Section
from attnres_train.model.parameters import Learned, ParameterRule, constant
from attnres_train.model.residual.kind import ResidualKind
from attnres_train.model.residual.stream import Residual, ResidualStream


class ScaledStream(ResidualStream):
    def write(self, sublayer, output):
        super().write(sublayer, self.readers[sublayer] * output)


class Scaled(Residual):
    def reader(self, sublayer, weights):
        return weights.get("scale")

    def stream(self, readers, blocks, partial):
        return ScaledStream(self.plan, readers, blocks, partial)


class LayerScale(ResidualKind):
    """One running sum of outputs times learned vectors."""

    implementation = Scaled

    class Options(Section):
        init: float = Field(0.1, gt=0)
        """What every scale begins as."""

    def learned(self, sublayer):
        if sublayer > self.model.num_sublayers:
            return {}  # the output head reads the sum
        rule = ParameterRule(constant(self.options.init), weight_decay=False)
        return {"scale": Learned((self.model.hidden_size,), rule)}
