"""`distill` runs a whole job, from a recipe to a published folder.

A recipe of several students is several trainings, each a job of its own that may run anywhere. Here they run one after
another; what is finished is not made again, so a job that was stopped goes on where it stood.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.jobs.inputs import held_out_data, hold_out, load_data, load_teacher
from distillers.jobs.merge import merge
from distillers.jobs.publish import publish
from distillers.jobs.recipe import Recipe
from distillers.models.denoiser import Denoiser
from distillers.teacher import Teacher
from distillers.training.checkpoints import decisive, newest_checkpoint, read_about
from distillers.training.distiller import on_one_base
from distillers.training.head import HeadFit, check_start, fit_settings, head_errors, head_of, usable
from distillers.training.latents import encoded_once, tell_unread
from distillers.training.stored import place_of_encoded
from distillers.training.trainer import begin, train
from distillers.training.watch import best_iteration
from distillers.weights.manifest import MANIFEST
from distillers.weights.read import origin
from distillers.weights.write import check_target


def distill(recipe: Recipe, folder: Path, device: str | None = None) -> None:
    """Train what a recipe describes and publish it as `folder`; the training itself is in folder/training.

    The students of a job of several are trained one after another, each published as folder/training/student-k, and
    merged.

    Args:
        device: "cpu", or None for the GPU where there is one.

    Raises:
        BadInput: whatever the recipe, its teacher, its data or the folder cannot do.
        TrainingStopped: as `train`; the same call goes on.
    """
    from accelerate import PartialState

    check_target(folder, recipe.inputs())
    recipe = recipe if _began(folder, recipe) else hold_out(recipe)
    parts = recipe.parts()
    if len(parts) == 1:
        _train(parts[0], folder, device)
        return
    places = [folder / "training" / part.name.removeprefix(f"{recipe.name}-") for part in parts]
    for part, place in zip(parts, places, strict=True):
        if not _finished(place, part):
            _train(part, place, device)
    if PartialState().is_main_process:
        merge(places, folder)


def _train(recipe: Recipe, folder: Path, device: str | None) -> None:
    """Run one training and publish it from the main process while the others wait."""
    from accelerate import PartialState

    whole, method, settings = load_data(recipe), recipe.distiller(), recipe.settings()
    teacher = load_teacher(recipe, whole)
    data = method.data(whole, teacher)
    tell_unread(data, teacher)
    teacher = with_head(teacher, recipe, data, folder / "training", device)
    made = train(
        method,
        teacher,
        encoded_once(data, teacher, place_of_encoded(folder / "training"), settings.cache_gb, device),
        settings,
        folder / "training",
        description=recipe.table(),
        device=device,
        held_out=method.data(held_out_data(recipe), teacher) if settings.watch_every else None,
    )
    if PartialState().is_main_process:
        learnt_from = teacher if recipe.teacher else None
        publish(method.finish(made, data), recipe, folder, teacher=learnt_from, data=data)
    PartialState().wait_for_everyone()


def with_head(teacher: Teacher, recipe: Recipe, data: ImageData, place: Path, device: str | None) -> Teacher:
    """Give a teacher what its students start as and where they start sampling, as the recipe's [student] table says.

    A head that is not the teacher's is trained first, in place/head, and its error printed; a finished one is reopened.
    With [lora] the students are roles on the teacher's own network, whose head they keep.
    """
    begun = _with_head(teacher, recipe, data, place, device)
    adapters = recipe.lora_settings()
    return begun if adapters is None else on_one_base(begun, adapters, origin(str(recipe.teacher)))


def _with_head(teacher: Teacher, recipe: Recipe, data: ImageData, place: Path, device: str | None) -> Teacher:
    from accelerate import PartialState

    method, settings, student = recipe.distiller(), recipe.settings(), recipe.student_settings()
    if method.starts_from != "teacher":
        return teacher
    check_start(student, teacher)
    teacher = replace(teacher, start_time=student.start_time)
    own, head = teacher.denoiser, head_of(student, method, teacher, adapters=recipe.lora is not None)
    if head == own.prediction:
        if (schedule := usable(own)) is own.schedule:
            return teacher
        return replace(teacher, learner=Denoiser(own.network, schedule, own.prediction))
    if newest_checkpoint(place) and not newest_checkpoint(place / "head"):  # its weights predict what the teacher does
        allowed = f"teacher, for the training in {place} began so; or a new folder"
        raise BadInput("student.head", f"{student.head}, which is {head}", allowed)
    fit = fit_settings(settings, student)
    about = {**recipe.table(), "stage": "head"}
    latents = encoded_once(data, teacher, place_of_encoded(place), settings.cache_gb, device)
    method = HeadFit(prediction=head, pictures=data.pictured)
    made = train(method, teacher, latents, fit, place / "head", description=about, device=device)
    learner = made.denoiser
    assert isinstance(learner, Denoiser)
    errors = head_errors(learner, teacher, data)
    told = ", ".join(f"{error:.3f} at t = {t:g}" for t, error in errors.items())
    PartialState().print(f"the student predicts {head} in place of {own.prediction}; its x0 is off by {told} (rms)")
    return replace(teacher, learner=learner)


def publish_run(run: Path, folder: Path, which: str = "last", autoencoder: str | None = None) -> str:
    """Publish the averaged weights of a training from its newest checkpoint, without training on.

    Args:
        run: the folder of a `distill`, or its training/ folder.
        which: "last", or "best" by the watch.
        autoencoder: a folder whose autoencoder takes the place of the one that it was trained with.

    Returns:
        What was published, in words.

    Raises:
        BadInput: no checkpoint there, no watched weights, or a student of several, which `merge` needs whole.
    """
    if which not in ("last", "best"):
        raise BadInput("which", which, "last or best")
    place = run / "training" if (run / "training").is_dir() else run
    checkpoint = newest_checkpoint(place)
    if checkpoint is None:
        raise BadInput("run", str(run), "the folder of a training with a checkpoint")
    recipe = Recipe.from_table(read_about(checkpoint)["description"])
    if recipe.whole() != recipe:
        alone = f"a training of another method: students of {recipe.method} are published when they end"
        raise BadInput("run", str(run), alone)
    check_target(folder, [*recipe.inputs(), run / "training", checkpoint.parent])
    whole, method, settings = load_data(recipe), recipe.distiller(), recipe.settings()
    teacher = load_teacher(recipe, whole)
    teacher = with_head(teacher, recipe, method.data(whole, teacher), place, "cpu")
    state = begin(method, teacher, settings, place, description=recipe.table(), device="cpu")
    iteration = state.resume()
    if which == "best":
        iteration = best_iteration(place)
    state.close()
    data = method.data(whole, teacher)
    made = method.finish(state.generator("best" if which == "best" else "last"), data)
    learnt_from = teacher if recipe.teacher else None
    publish(made, recipe, folder, teacher=learnt_from, data=data, iteration=iteration, autoencoder=autoencoder)
    return f"the averages of iteration {iteration} of {settings.iterations}"


def _began(folder: Path, recipe: Recipe) -> bool:
    """Say whether the folder holds a training that learns from the very data of this recipe."""
    checkpoint = newest_checkpoint(folder / "training")
    return checkpoint is not None and decisive(read_about(checkpoint)["description"]) == decisive(recipe.table())


def _finished(folder: Path, recipe: Recipe) -> bool:
    """Say whether this recipe has made the folder already, to its end. Raises BadInput if another recipe has."""
    if not (folder / MANIFEST).is_file():
        return False
    made, wanted = Recipe.load(folder / "recipe.toml").table(), recipe.table()
    if made == wanted:
        return True
    if decisive(made) != decisive(wanted):
        raise BadInput(str(folder), "a student of another recipe", "a folder that this recipe made, or none")
    return False  # its checkpoint is of a shorter training
