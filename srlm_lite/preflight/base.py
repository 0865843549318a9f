"""The base: that it is here, can be spoken to, carries the adapters and gives them back."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from srlm_lite.errors import UserError
from srlm_lite.methods import method_of
from srlm_lite.planning.room import room_for, unjudged
from srlm_lite.preflight.launch import Launch, Seen
from srlm_lite.session import (
    import_backend,
    refuse_absent_base,
    refuse_unexportable,
    refuse_unreadable_base,
)
from srlm_lite.settings import LORA_TARGETS
from srlm_lite.stages.seed_data import (
    FilesOfRecipe,
    check_window,
    shapes_asked,
    taught_thoughts,
)
from srlm_lite.window import leaves_room


def backend(launch: Launch) -> Seen:
    """Unsloth, where the recipe has it: it is imported before anything that it rewrites."""
    import_backend(launch.recipe)
    return Seen(launch.recipe.base.backend)


def base(launch: Launch) -> Seen:
    """That the base is here, as a model, or on the Hub."""
    from srlm_lite.model.whereabouts import located, refuse_no_model

    here = refuse_absent_base(launch.recipe, launch.run)
    name = launch.recipe.base.name
    kind, location = located(name)
    if kind == "directory":
        refuse_no_model(Path(location))
    if not here:
        return Seen(name, (f"{name} is not here yet: it is going to be downloaded",))
    return Seen(name)


def layers(launch: Launch) -> Seen:
    """That names of `lora.targets` stand in the base's files or its family's code."""
    from srlm_lite.model.layer_names import refuse_absent_layers

    recipe, run = launch.recipe, launch.run
    if launch.begun is not None and launch.begun.anchor.is_done:
        return Seen("the run has an adapter on them", asked=False)
    noted = None if run is None else run.base_revision
    if not refuse_absent_layers(recipe.base, recipe.targets, revision=noted):
        return Seen("not told by names in its files or its family's code", asked=False)
    return Seen("its files, or its family's code, name what is adapted")


def files(launch: Launch) -> Seen:
    """What is in the base's files, where they are here."""
    refuse_unreadable_base(launch.recipe, launch.run)
    return Seen("can be read, as far as that shows without loading them")


def device(launch: Launch) -> Seen:
    """The device that the recipe names, and what its quantization needs."""
    from srlm_lite.model.device import (
        compute_device,
        compute_dtype,
        refuse_absent_device,
        refuse_quantization,
    )

    section = launch.recipe.base
    refuse_absent_device(section.device)
    refuse_quantization(section)
    if section.backend == "unsloth":  # which settles first how CUDA is to allocate
        return Seen(f"{section.device}, quantization {section.quantization}")
    found = compute_device(section.device)
    dtype = str(compute_dtype(section)).removeprefix("torch.")
    return Seen(f"{found.type}, {dtype}, quantization {section.quantization}")


def targets(launch: Launch) -> Seen:
    """That the base has the layers that the adapters go on, and that they can be exported."""
    recipe = launch.recipe
    refuse_unexportable(recipe, launch.run)
    try:
        shape = launch.plan.shape
    except UserError as error:
        if error.where == LORA_TARGETS:
            raise
        return Seen("not known before the base is loaded", asked=False)
    return Seen(f"{len(shape.adapted(recipe.targets))} layers carry an adapter")


def anchor(launch: Launch) -> Seen:
    """That an anchor which is taken from elsewhere can be read, and is one for this base."""
    from srlm_lite.model.stack import Adapter

    recipe = launch.recipe
    if recipe.anchor.init == "base":
        return Seen("it is trained", asked=False)
    if launch.begun is not None and launch.begun.anchor.training.is_file():
        return Seen("the run has it", asked=False)
    where = f"anchor.init = {recipe.anchor.init}"
    adapter = Adapter.load(Path(recipe.anchor.init))
    try:
        layers = {one.name: one for one in launch.plan.shape.adapted(recipe.targets)}
    except UserError:
        return Seen("not known before the base is loaded", asked=False)
    if missing := adapter.factors.keys() - layers.keys():
        raise UserError(
            f"it has weights for {min(missing)}, which the base does not have or the recipe does "
            "not target",
            where=where,
            way_out="Take the base that it was trained on, and the same lora.targets",
        )
    for name, (a, b) in adapter.factors.items():
        layer = layers[name]
        if (a.shape[1], b.shape[0]) != (layer.inputs, layer.outputs):
            raise UserError(
                f"its {name} is for a layer of {a.shape[1]} to {b.shape[0]}, the base's is one of "
                f"{layer.inputs} to {layer.outputs}",
                where=where,
                way_out="Take the base that it was trained on",
            )
    return Seen(f"rank {adapter.rank}, for {len(adapter.factors)} layers")


def template(launch: Launch) -> Seen:
    """That the base can be spoken to: its tokenizer and chat template, which are proved."""
    chat = launch.chat
    if chat is None:
        return Seen("not known before the base is loaded", asked=False)
    return Seen("own" if launch.recipe.base.chat_template is None else "the recipe's")


def conversations(launch: Launch) -> Seen:
    """That the template writes every turn of what the policy is to answer, and `base.system`."""
    recipe, chat = launch.recipe, launch.chat
    if chat is None:
        return Seen("not known before the base is loaded", asked=False)
    shapes = shapes_asked(recipe, method_of(recipe).pool(FilesOfRecipe(recipe)))
    for where, asked in shapes.values():
        try:
            chat.prompt_ids(asked)
        except UserError as error:
            raise UserError(error.what, where=where, way_out=error.way_out) from error
    if len(shapes) == 1:
        alone = recipe.base.system is None
        return Seen("single user turns" if alone else "single user turns, under a system message")
    return Seen(f"{len(shapes)} successions of turns, all of which the template writes")


def thoughts(launch: Launch) -> Seen:
    """That thoughts which stand in what the anchor learns are going to be taken for thoughts."""
    chat = launch.chat
    if chat is None:
        return Seen("not known before the base is loaded", asked=False)
    if chat.thinks:
        return Seen("the base thinks")
    count = taught_thoughts(launch.recipe)
    told = (
        f"{count:,} replies of the instruction data begin with a thought, and the base does not "
        "think, or is told not to: it learns them as text. Take the thoughts out, or let it think "
        "(base.chat_template_kwargs)"
    )
    if count:
        return Seen(f"{count:,} are taught as text", (told,))
    return Seen("none are taught")


def capabilities(launch: Launch) -> Seen:
    """That the harness knows the tasks of the capability panel."""
    section = launch.recipe.evaluate
    if not section.tasks:
        return Seen("no tasks are named", asked=False)
    from srlm_lite.model.harness import task_manager

    task_manager(section.tasks, Path(section.tasks_dir) if section.tasks_dir else None)
    return Seen(f"{len(section.tasks)} tasks")


def judging(launch: Launch) -> Seen:
    """That all which may be sampled can be judged: a judge's question holds the rubric as well."""
    room = room_for(launch.recipe)
    if room is None:
        return Seen("by a server, which has a window of its own", asked=False)
    text = f"{room.judged:,} tokens of prompt and reply, {room.sampled:,} may be sampled"
    found = unjudged(room)
    return Seen(text, () if found is None else (f"{found[0]}. {found[1]}",))


def prompts_that_fit(launch: Launch) -> Seen:
    """That enough prompts leave room for an answer, in tokens of the base."""
    recipe, chat = launch.recipe, launch.chat
    if chat is None or not recipe.iterations:
        return Seen("not known before the base is loaded", asked=False)
    if launch.begun is not None and launch.begun.anchor.is_done:
        return Seen("of a run that has its anchor every iteration asks", asked=False)
    thought = recipe.rollout.max_thought_tokens if chat.thinks else 0
    check_window(recipe, thought=thought)
    pool = method_of(recipe).pool(FilesOfRecipe(recipe))
    if pool is None:
        return Seen("the anchor writes them", asked=False)
    listed, path = pool
    wanted = (1 if recipe.prompts.reuse else recipe.iterations) * recipe.prompts.per_iteration
    answer, whole = recipe.rollout.max_new_tokens, recipe.base.window
    fitting = (
        prompt
        for prompt in listed
        if leaves_room(len(chat.policy_ids(prompt)), whole, answer=answer, thought=thought)
    )
    count = sum(1 for _ in islice(fitting, wanted))
    if count < wanted:
        again = "" if recipe.prompts.reuse else ", or set prompts.reuse=true"
        lower = " or rollout.max_thought_tokens" if thought else ""
        raise UserError(
            f"has {count} prompts that fit the window of {whole} tokens beside an answer of "
            f"{answer}, and {wanted} are wanted",
            where=str(path),
            way_out=f"Lower prompts.per_iteration{lower}, raise base.window{again}",
        )
    return Seen(f"{count:,} leave room for an answer of {answer} tokens")
