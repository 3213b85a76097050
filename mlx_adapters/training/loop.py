"""`train`: from a base model and rows to an adapter, in a way that can stop anywhere and go on exactly.

One iteration is one optimizer update. After it the run reports, evaluates and saves if that is due; nothing
is carried from one iteration to the next but the weights, the optimizer, the random state and the counters
in `State`, and a checkpoint holds all four.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch
from mlx_adapters.errors import TrainingError
from mlx_adapters.events import (
    CheckpointSaved,
    Event,
    Note,
    OnEvent,
    Progress,
    TrainReport,
    ValidationReport,
)
from mlx_adapters.models.dense import finer_types
from mlx_adapters.optimization.distributed import LostPeerError
from mlx_adapters.optimization.feed import Draw, Feed
from mlx_adapters.optimization.objectives import means, with_sums
from mlx_adapters.optimization.optimizers import learning_rate
from mlx_adapters.optimization.step import OutOfMemoryError, Taken, TrainStep
from mlx_adapters.storage.tensor_names import LORA_B, split
from mlx_adapters.system.door import mx
from mlx_adapters.system.interrupt import Interrupt, InterruptedWork
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import RunFolder
from mlx_adapters.training.state import State
from mlx_adapters.units import count, duration, number

WARM_UP = 3  # iterations: the first ones compile and fill caches


@dataclass
class Loop:
    """A run in progress."""

    train_step: TrainStep
    feed: Feed
    validation: Draw | None
    config: TrainConfig
    folder: RunFolder
    on_event: OnEvent
    interrupt: Interrupt = field(default_factory=Interrupt)
    state: State = field(default_factory=State)
    _saved_at: float = field(default_factory=time.monotonic)

    def restore(self, checkpoint: states.Checkpoint) -> None:
        """Stand where the checkpoint stood."""
        self.state = checkpoint.state
        self.train_step.restore(checkpoint.weights, checkpoint.optimizer)
        high, low = self.state.random
        mx.random.seed(high << 32 | low)  # the key is the seed's two halves
        self._reported = (self.state.seconds, self.state.trained_tokens, self.state.real_tokens)

    def run(self) -> State:
        """Train to the last iteration, or until an `on_event` stops it.

        Raises TrainingError; after saving KeyboardInterrupt, or what an `on_event` raised.
        """
        self.interrupt.saving = True
        mx.reset_peak_memory()  # what loading and the forecast took is no part of what is reported
        self._updates = self.feed.updates(self.state.batches)
        with self._saved_if_one_is_lost():
            with contextlib.suppress(InterruptedWork):
                self._make_up()
            while self.unfinished:
                others = self._others_end()
                with contextlib.suppress(InterruptedWork):  # what is left unfinished is made up for by a resume
                    self._iterate()
                if others or (self.interrupt.ends and self.train_step.world.size == 1):
                    self._end()
                    return self.state
        if self.interrupt.raised is not None:
            raise self.interrupt.raised
        self._tell_untouched()
        return self.state

    def _make_up(self) -> None:
        """Evaluate the untrained weights, and after an interrupt that came while the run evaluated."""
        iteration, losses = self.state.iteration, self.state.validation_losses
        if iteration == 0 and not losses:
            self._validate()
        elif self.validation is not None and self._is_due(iteration) and losses[-1:] and losses[-1][0] != iteration:
            self._conclude()

    @property
    def unfinished(self) -> bool:
        """Whether there are iterations to do."""
        return self.state.iteration < self.config.course.iterations and not self.state.stopped_early

    def _end(self) -> None:
        """Save what there is. Raises what ended the run, but for `Stop`."""
        if self.unfinished and self._unsaved:
            self.save()
        if self.unfinished:
            self._say(f"Stopped at iteration {self.state.iteration}. {self.folder.how_to_resume()}")
        if self.interrupt.raised is not None:
            if self.unfinished:
                self.interrupt.raised.add_note(f"Saved at iteration {self.state.iteration}: resume=True goes on.")
            raise self.interrupt.raised
        if self.unfinished and not self.interrupt.stopped:
            raise KeyboardInterrupt

    def _tell_untouched(self) -> None:
        """Name the layers whose update is still nothing: no gradient comes to them, so they were adapted in vain."""
        paths = [split(name)[0] for name, w in self.train_step.weights.items() if _is_untouched(name, w)]
        if paths:
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            text = f"No gradient came to {count(len(paths), 'adapted layer')} ({shown}): leave them out of the targets."
            self.on_event(Note(text, "warning"))

    def _others_end(self) -> bool:
        """Whether any of several processes is to end: all must after the same iteration, and in the same way."""
        world, mine = self.train_step.world, self.interrupt
        if world.size == 1:
            return False
        ends, stopped = world.sum(mx.array([mine.ends, mine.stopped], mx.int32)).tolist()
        mine.stopped = stopped > 0 and not mine.requested
        return ends > 0

    @contextlib.contextmanager
    def _saved_if_one_is_lost(self) -> Iterator[None]:
        """Where another process is lost, the last whole step is saved, which needs no other. Raises TrainingError."""
        try:
            yield
        except LostPeerError:
            if self._unsaved and self.folder.writes:
                self.save()
            lost = f"Another process of this run was lost after iteration {self.state.iteration}."
            raise TrainingError(lost, self.folder.how_to_resume()) from None

    def _iterate(self) -> None:
        start = time.perf_counter()
        self._step(next(self._updates))
        self._unsaved = True
        state, config = self.state, self.config
        state.seconds += time.perf_counter() - start
        self._tell_pace()
        if not self.unfinished or state.iteration % config.report_every == 0:
            self._report()
        self._conclude()
        self.on_event(Progress("train", state.iteration, config.course.iterations, "iteration"))

    def _is_due(self, iteration: int) -> bool:
        """Whether the iteration ends with an evaluation."""
        return iteration == self.config.course.iterations or iteration % self.config.course.eval_every == 0

    def _conclude(self) -> None:
        """Evaluate, stop early and save, if that is due."""
        state, config = self.state, self.config
        best = self._is_due(state.iteration) and self._validate()
        if config.early_stop is not None and state.evaluations_since_best >= config.early_stop:
            state.stopped_early = True
            self._say(f"Stopped early: no better validation loss than at iteration {state.best_iteration}.")
        if not self.unfinished or best or self._save_is_due():
            self.save()

    def _step(self, draw: Draw) -> None:
        state = self.state
        rate = learning_rate(self.config, state.iteration + 1)
        with self.train_step.world.own_random_numbers():
            taken, draw = self._taken(draw, rate)
        norms = {"loss": taken.loss, "gradient": taken.gradient_norm, "adapter": taken.weight_norm}
        self._require_finite(norms, draw.batches)
        state.iteration += 1
        state.batches += len(draw.drawn)
        state.trained_tokens += draw.trained_tokens
        state.real_tokens += draw.real_tokens
        state.pending_loss += taken.loss.item() * draw.weight
        state.pending_tokens += draw.weight
        state.pending_figures = with_sums(state.pending_figures, taken.figures)
        state.random = random_state()

    def _taken(self, draw: Draw, rate: float) -> tuple[Taken, Draw]:
        """One update, and the draw that it was made with: in smaller parts, if there was no room for it."""
        while True:
            try:
                with self._heeding():
                    return self.train_step.take(draw, rate, self._rounding(self.state.iteration + 1)), draw
            except OutOfMemoryError as error:
                draw = self._in_smaller_parts(draw, error)

    def _heeding(self) -> contextlib.AbstractContextManager[None]:
        """A signal ends what is computed in the block; of several processes, all end after the same iteration."""
        return self.interrupt.ending(self.train_step, self.train_step.world.size == 1 and self.unfinished)

    def _in_smaller_parts(self, draw: Draw, why: OutOfMemoryError) -> Draw:
        """The same rows, half as many predictions at a time from now on. Raises TrainingError for a single row."""
        lines, width = max((batch.tokens.shape for batch in draw.batches), key=math.prod)
        most = lines * (width - 1) // 2
        self.feed = replace(self.feed, most=most)
        smaller = self.feed.draw(draw.drawn)
        if len(smaller.batches) == len(draw.batches):
            less = "" if self.train_step.memory.again == "blocks" else "--memory blocks, or "
            raise TrainingError(
                f"There is no memory for a row of {width} tokens at iteration {self.state.iteration + 1} ({why}).",
                f"use {less}a --max-seq-length below {width}. {self.folder.how_to_resume()}",
            )
        self._say(
            f"There was no memory for {count(lines, 'row')} of {width} tokens: they are taken in parts from now on."
        )
        self._updates = self.feed.updates(self.state.batches + len(draw.drawn))
        memory = replace(self.train_step.memory, positions=most)
        self.folder.update_recipe({"memory": asdict(replace(memory, near=None))})
        return smaller

    def _rounding(self, iteration: int) -> bool:
        return self.config.fuse_aware is not None and iteration > self.config.fuse_aware_from

    def _require_finite(self, values: dict[str, mx.array], batches: list[Batch]) -> None:
        what = next((name for name, value in values.items() if not math.isfinite(value.item())), None)
        if what is None:
            return
        rows = [where for batch in batches for where in batch.where]
        named = "; ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise TrainingError(
            f"The {what} became NaN or infinite at iteration {self.state.iteration + 1}; rows in the batch: {named}.",
            self._against_nan(trained=self.state.iteration > 0 or what == "adapter"),
        )

    def _against_nan(self, trained: bool) -> str:
        ways = finer_types(self.train_step.module)
        if not trained:  # no learning rate can have to do with it
            ways.append("a smaller --scale")
            return f"nothing is trained yet: try {' or '.join(ways)}, and look at the base and these rows."
        ways += ["--max-grad-norm 1"] if self.config.max_grad_norm is None else []
        return f"try {' or '.join(['a lower learning rate', *ways])}. {self.folder.how_to_resume()}"

    def _report(self) -> None:
        state = self.state
        loss = state.pending_loss / state.pending_tokens
        state.train_losses.append((state.iteration, loss))
        if figures := means(state.pending_figures):
            state.train_figures.append((state.iteration, figures))
        seconds, trained, real = self._reported
        seconds = max(state.seconds - seconds, 1e-9)
        trained, real = state.trained_tokens - trained, state.real_tokens - real
        self._reported = (state.seconds, state.trained_tokens, state.real_tokens)
        state.pending_loss, state.pending_tokens, state.pending_figures = 0.0, 0, {}
        self.on_event(
            TrainReport(
                state.iteration,
                self.config.course.iterations,
                loss,
                learning_rate(self.config, state.iteration),
                trained / seconds,
                real / seconds,
                mx.get_peak_memory(),
                figures,
                self.train_step.world.size,
            )
        )

    def __post_init__(self) -> None:
        self.state.random = random_state()
        self._reported = (0.0, 0, 0)
        self._steps, self._warm, self._unsaved = 0, (0.0, 0), False

    def _tell_pace(self) -> None:
        """After three iterations of warm-up and three more: how long one takes, and the rest."""
        state, left = self.state, self.config.course.iterations - self.state.iteration
        self._steps += 1
        if self._steps == WARM_UP:
            self._warm = (state.seconds, state.real_tokens)
        elif self._steps == 2 * WARM_UP and left:
            seconds, tokens = state.seconds - self._warm[0], state.real_tokens - self._warm[1]
            each = seconds / max(tokens, 1) * self.feed.tokens_per_update
            self._say(f"About {number(each)} s per iteration, {duration(each * left)} for the remaining {left}.")

    def _validate(self) -> bool:
        """Evaluate; True if this is the best so far. Without validation rows there is no best."""
        if self.validation is None:
            return False
        with self._heeding():
            loss, sums = self.train_step.evaluate(self.validation, self._rounding(self.state.iteration))
        if not math.isfinite(loss):
            raise TrainingError(
                f"The validation loss became NaN or infinite at iteration {self.state.iteration}.",
                self._against_nan(trained=self.state.iteration > 0),
            )
        if self._rounding(self.state.iteration) and not self._rounding(self.state.best_iteration or 0):
            self.state.best_loss = None  # losses with and without rounding cannot be compared
        figures = means(sums)
        best = self.state.record_validation(loss, figures)
        self.on_event(ValidationReport(self.state.iteration, loss, best, figures))
        return best

    def _save_is_due(self) -> bool:
        minutes = self.config.save_every_minutes
        timed = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return timed or self.state.iteration % self.config.course.save_every == 0

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        start = time.perf_counter()
        folder = self.folder.save(self.state, self.train_step.weights, self.train_step.optimizer.arrays())
        self._saved_at, self._unsaved = time.monotonic(), False
        self.on_event(CheckpointSaved(self.state.iteration, str(folder), time.perf_counter() - start))

    def _say(self, text: str) -> None:
        event: Event = Note(text)
        self.on_event(event)


def _is_untouched(name: str, weight: mx.array) -> bool:
    return split(name)[1] == LORA_B and not mx.any(weight != 0).item()


def random_state() -> list[int]:
    """The key of MLX's random numbers."""
    return np.array(mx.random.state[0]).tolist()
