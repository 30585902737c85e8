"""What of a stage is kept: the weights of its checkpoints, and the model that it leaves behind."""

from torch import Tensor, nn

from chiasm.fusion.adapters import merge_adapters, plain_name
from chiasm.training.checkpoint import OPTIMIZER, Saved, restore
from chiasm.training.context import Context
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.schema import Stage
from chiasm.training.selection import teaches_speech
from chiasm.training.stage_model import StageModel
from chiasm.training.stages import FreezePlan


class StageState:
    """The state of one stage.

    Args:
        originals: of frozen weights that the stage holds as copies, the weights themselves by name.
    """

    def __init__(
        self, context: Context, stage: Stage, learner: StageModel, plan: FreezePlan, originals: dict[str, Tensor]
    ) -> None:
        self.context, self.stage, self.learner, self.plan, self.originals = context, stage, learner, plan, originals

    def restore(self, saved: Saved) -> None:
        """Goes on with the weights of a checkpoint of this stage."""
        restore(self._parameters(), saved, self.originals)

    def restore_moments(self, saved: Saved, optimizer: StageOptimizer) -> None:
        """Goes on with the optimizer's moments."""
        moments = optimizer.empty_state(saved.names(OPTIMIZER))
        saved.read_into(OPTIMIZER, moments)
        optimizer.load_state_dict(moments)

    def save(self, done: int, optimizer: StageOptimizer) -> None:
        """A checkpoint after so many steps: everything that this stage or an earlier one trains; of frozen weights the
        originals, not the copies."""
        weights = {
            name: optimizer.parameters[name].data
            if name in optimizer.parameters
            else self.originals.get(name, parameter.data)
            for name, parameter in self._parameters().items()
            if name in self.plan.trainable or plain_name(name) in self.context.trained
        }
        keep = self.stage.keep_checkpoints
        self.context.run.save(self.stage.name, done, False, weights, optimizer.state_dict(), keep)

    def finish(self, num_steps: int) -> None:
        """Merges adapters, and writes the stage's last checkpoint and, where models are kept, its model folder.

        The checkpoint holds what later stages need. The model of a stage that reads captions has more than that (the
        text branch and the heads), so its folder is written in any case, and first.
        """
        run, model, trained = self.context.run, self.learner.model, self.context.trained
        changed = set(self.plan.trainable) | set(merge_adapters(model))
        trained |= changed & {plain_name(name) for name, _ in self.context.model.named_parameters()}
        model.requires_grad_(False).eval()
        if teaches_speech(self.context.model, self.stage):
            self.context.model.config.fresh_connector = False
        if self.stage.reads_captions:
            run.save_stage(self.stage.name, model, self.learner.processor)
        final = {name: p.data for name, p in self.context.model.named_parameters() if plain_name(name) in trained}
        run.save(self.stage.name, num_steps, True, final, {}, self.stage.keep_checkpoints)
        if not run.keeps_models:
            return
        if not self.stage.reads_captions:
            run.save_stage(self.stage.name, model, self.learner.processor)
        run.save_result(self.stage.name, self.context.model, self.context.processor)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Of the generative model and of the stage's own, whose common ones are the same tensors."""
        own = dict(self.learner.model.named_parameters())
        known = {id(parameter) for parameter in own.values()}
        return {name: p for name, p in self.context.model.named_parameters() if id(p) not in known} | own
