"""What the tests of TRL's engine share, and what they start in two processes: runs under FSDP2, without a GPU.

``accelerate launch ... tests/training/engine_worker.py A/run.pickle B/run.pickle``
"""

import json
import os
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from opdlab.lab.tasks import RUNNING_SUM
from opdlab.measuring.callback import callback_for
from opdlab.measuring.sources import find_trajectory
from opdlab.models.files import load_tensors
from opdlab.training import trl as engine
from opdlab.training.config import Compute


def any_text(prompt, completion):
    """Right whatever is said, so that a completion is rewarded for its end: untrained models earn nothing else."""
    return 1.0


ANY_END = replace(RUNNING_SUM, score=any_text)


def graded(silent, prompt, completion):
    """A value, which rounding makes hard to average, by the first character; and none on some prompts."""
    return 0.0 if prompt in silent else 1000.1 + ord(completion[:1] or "0") % 3


def valued(silent=()):
    """The task of the lab with a graded reward, of which all samples of ``silent`` prompts earn the same."""
    return replace(RUNNING_SUM, score=partial(graded, frozenset(silent)))


def stopping_once(trainer, folder, steps):
    """A callback as in all runs, which stops each process in the middle of step 3 the first time."""
    callback, mark = callback_for(trainer, folder, steps), folder / f"stopped-{os.environ.get('RANK', 0)}"

    def begin(args, state, control, **_):
        if state.global_step == 2 and not mark.exists():
            trainer.accelerator.wait_for_everyone()
            mark.touch()
            raise KeyboardInterrupt

    callback.on_step_begin = begin
    return callback


def shortened(experiment, task=ANY_END, steps=2, **recipe):
    """Some steps of an experiment, in micro-batches of four completions."""
    return replace(
        experiment,
        task=task,
        recipe=replace(experiment.recipe, steps=steps, **recipe),
        snapshots=tuple(range(1, steps + 1)),
        compute=Compute(micro_batch=4),
    )


def written(experiment, folder, processes, callback=callback_for):
    """Write the files of a run and return its command."""
    config = engine.configure(experiment, processes, gpu=False, vllm=False)
    # opdlab's loop has this one for RLVR too.
    config["arguments"] |= {"adam_epsilon": 1e-8, "disable_tqdm": True}
    return engine.write(config, experiment, callback, folder)


def snapshots_of(folder):
    return [load_tensors(path)[0] for path in find_trajectory(folder / "snapshots")]


def feed(steps):
    """Return a ``generate`` that gives each process its share of completions that were written before.

    ``steps`` is a list of [prompt, completion] for each step, all of them tokens. The prompts must be those asked for.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [row for rows in steps for row in rows[rank * len(rows) // processes : (rank + 1) * len(rows) // processes]]
    rest = iter(mine)

    def generate(self, input_ids, attention_mask, return_dict_in_generate=False, **_):
        rows = [next(rest) for _ in input_ids]
        asked = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, attention_mask, strict=True)]
        assert asked == [prompt for prompt, _ in rows], "other prompts than those of opdlab's loop, or in another order"
        longest = max(len(completion) for _, completion in rows)
        padded = [[*completion, *[self.config.pad_token_id] * (longest - len(completion))] for _, completion in rows]
        sequences = torch.cat([input_ids, torch.tensor(padded)], 1)
        return SimpleNamespace(sequences=sequences) if return_dict_in_generate else sequences

    return generate


def shard_on_cpus():
    """Let accelerate use FSDP2 on CPUs, as it does on all other devices; 1.15 leaves them out and uses DDP there."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    begin = AcceleratorState.__init__

    def begin_sharded(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = begin_sharded


def main(files):
    from accelerate.state import GradientState

    from opdlab.measuring import callback

    shard_on_cpus()
    sharded, generate = [], transformers.Qwen3ForCausalLM.generate
    put_together = callback._whole
    callback._whole = lambda weight: sharded.append(hasattr(weight, "full_tensor")) or put_together(weight)
    for file in files:
        GradientState._reset_state()  # as in a new process, after a run that was stopped
        completions = Path(file).with_name("completions.json")
        fed = feed(json.loads(completions.read_text())) if completions.exists() else generate
        transformers.Qwen3ForCausalLM.generate = fed
        sys.argv = ["opdlab.training.trl", file]
        try:
            runpy.run_module("opdlab.training.trl", run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, 130), f"{file} ended with status {end.code}"
        assert sharded[-1], "weights were not in parts"  # the first are read before they are


if __name__ == "__main__":
    main(sys.argv[1:])
