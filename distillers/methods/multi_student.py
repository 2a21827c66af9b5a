"""Multi-student distillation (MSD) partitions the classes, or the captions, and trains one student for each share.

Song, Lorraine, Nie, Kreis and Lucas, "Multi-student Diffusion Distillation for Better One-step Generators", 2025; no
code was released.

G_k = Distill(teacher, data of V_k), k = 0 .. K-1, where V_k are disjoint shares of the classes, as equal in size as can
be; of text to image, clusters of captions of equal size. A picture's class or prompt selects its student, so a picture
costs one student's pass: capacity grows with K, latency does not. A student learns by another method (`base`); one
training makes one student. What is new here is the first stage of a student that cannot start as its teacher, because
it is smaller: teacher score matching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from distillers import methods
from distillers.autoencoder import Autoencoder
from distillers.data import ImageData, Part
from distillers.data.captioned import CaptionedFolder
from distillers.errors import BadInput, checked
from distillers.generator import Generator
from distillers.models.clusters import Clusters, clusters_of, prompt_embeddings, squared_distances
from distillers.models.conditions import Cond
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, split_batch
from distillers.training.losses import diffuse, score_matching

NAME = "multi_student"
FITTED = 1000  # captions that clusters are found by; memory grows with the square
ENCODED = 64  # captions at a time


@dataclass(frozen=True, kw_only=True)
class MultiStudent(Distiller):
    """E_{y in V_k} (min(SNR, 20) + 1) || x0_student(x_t, t, y) - x0_teacher(x_t, t, y) ||^2, then the base method."""

    tasks: ClassVar[tuple[str, ...]] = ("class-to-image", "text-to-image")

    students: int = 1  # K (paper: 4); 1 is the base method itself
    student: int | None = None  # k, which one this job trains; absent: `fewstep distill` trains all, one after another
    partition: Literal["consecutive", "clusters"] = "consecutive"  # clusters: of class or caption embeddings
    start: str | None = None  # absent: the teacher's weights; "untrained"; or a folder of the same network
    network: dict[str, Any] | None = None  # options of the teacher's network class that differ: a smaller student
    matching: float | None = None  # share of the training for score matching; absent: 0.3, or 0 if it starts trained
    base: str = "dmd2"  # the method of the stages after it
    options: dict[str, Any] = field(default_factory=dict)  # the base method's own table

    def __post_init__(self) -> None:
        if self.students < 1:
            raise BadInput(f"{NAME}.students", self.students, "1 or more")
        if self.student is not None and not 0 <= self.student < self.students:
            raise BadInput(f"{NAME}.student", self.student, f"0 to {self.students - 1}, or absent: all in turn")
        if self.matching and not (0 <= self.matching < 1 and self.untrained):
            allowed = "0 up to, not including, 1; 0 for a student that starts trained"
            raise BadInput(f"{NAME}.matching", self.matching, allowed)
        bases = [name for name in methods.names() if name != NAME and methods.find(name).starts_from == "teacher"]
        if self.base not in bases or not set(self.tasks) & set(methods.find(self.base).tasks):
            raise BadInput(f"{NAME}.base", self.base, "a method for classes or text: " + ", ".join(bases))
        for name, own in (("start", self.start), ("network", self.network)):
            if name in self.options:
                raise BadInput(f"{NAME}.options.{name}", self.options[name], f"absent: {NAME}.{name} says it")
            if own and name not in {f.name for f in fields(methods.find(self.base))}:
                raise BadInput(f"{NAME}.{name}", own, f"absent: students of {self.base} start as the teacher")
        assert self.method  # refuse wrong options before anything is opened

    @cached_property
    def method(self) -> Distiller:
        """Build the base method with this student's start and network."""
        kind, start = methods.find(self.base), {"start": self.start, "network": self.network}
        options = {**self.options, **{name: value for name, value in start.items() if value}}
        return kind(**checked(kind, options, f"{NAME}.options"))

    @property
    def untrained(self) -> bool:
        """Say whether the student starts with random weights."""
        return bool(self.network) or self.start == "untrained"

    @property
    def matched(self) -> float:
        """Return the share of the training, 0 to 1, after which the base method takes over."""
        return (0.3 if self.untrained else 0.0) if self.matching is None else self.matching

    def parts(self) -> list[dict[str, Any]]:
        if self.students == 1:
            return [{}]
        return [{"student": k} for k in (range(self.students) if self.student is None else [self.student])]

    # --- shares ------------------------------------------------------------------------------------------------------
    def shares(self, teacher: Teacher) -> list[list[int]]:
        """Partition the labels: V_0 .. V_{K-1}. Raises BadInput for fewer labels than students."""
        classes = len(teacher.info.labels)
        if self.students > classes:
            raise BadInput(f"{NAME}.students", self.students, f"1 to {classes}, a class or more for each")
        if self.partition == "clusters":
            return equal_clusters(class_embeddings(teacher), self.students)
        return [part.tolist() for part in np.array_split(np.arange(classes), self.students)]

    def share(self, teacher: Teacher) -> list[int]:
        """Return the labels V_k of this student. Raises BadInput if there are several and none is chosen."""
        shares = self.shares(teacher)
        self._check_chosen()
        return shares[self.student or 0]

    def _check_chosen(self) -> None:
        """Raise BadInput if there are several students and none is chosen."""
        if self.student is None and self.students > 1:
            raise BadInput(f"{NAME}.student", None, f"0 to {self.students - 1}: one training makes one student")

    def clusters(self, data: ImageData, teacher: Teacher) -> Clusters:
        """Partition captions by their embeddings into K clusters of equal size. Raises BadInput for what has none."""
        if self.partition != "clusters":
            raise BadInput(f"{NAME}.partition", self.partition, "clusters: captions have no order")
        if not isinstance(data, CaptionedFolder):
            raise BadInput("data", data.name, 'a folder of pictures with texts, kind = "captions"')
        every = sorted(set(data.texts))
        captions = [every[i * len(every) // FITTED] for i in range(FITTED)] if len(every) > FITTED else every
        if self.students > len(captions):
            raise BadInput(f"{NAME}.students", self.students, f"1 to {len(captions)}, a caption or more for each")
        points = torch.cat([prompt_embeddings(cond) for cond in _encoded(captions, teacher)])
        return clusters_of(captions, points, equal_clusters(points, self.students))

    def data(self, data: ImageData, teacher: Teacher) -> ImageData:
        if teacher.info.task == "text-to-image":
            self._check_chosen()
            if self.students == 1:
                return data
            clusters = self.clusters(data, teacher)
            assert isinstance(data, CaptionedFolder) and self.student is not None
            texts = sorted(set(data.texts))
            drawn = torch.cat([clusters.of(cond) for cond in _encoded(texts, teacher)]).tolist()
            of = dict(zip(texts, drawn, strict=True))
            # what `clause_dropout` leaves of a text is learnt by the student of the whole text
            part = data.part([i for i, text in enumerate(data.texts) if of[text] == self.student])
            part.clusters = replace(clusters, students=[self.student])
            return part
        share = self.share(teacher)
        return data if self.students == 1 else Part(data, [data.labels[label] for label in share])

    @property
    def fits_head(self) -> bool:
        return self.method.fits_head

    @property
    def needs_pictures(self) -> bool:
        return self.matched > 0 or self.method.needs_pictures

    def networks(self, teacher: Teacher) -> Networks:
        if teacher.info.task == "text-to-image":
            self._check_chosen()
        else:
            self.share(teacher)
        nets = self.method.networks(teacher)
        if self.matched and "teacher" not in nets:
            raise BadInput(f"{NAME}.matching", self.matched, f"0: {self.base} has no teacher")
        return nets

    def draws(self, progress: float) -> int:
        return 1 if progress < self.matched else self.method.draws(self.base_progress(progress))

    def stage_starts(self) -> list[float]:
        later = [self.matched + (1 - self.matched) * start for start in self.method.stage_starts()]
        return [0.0, *later] if self.matched else later

    def base_progress(self, progress: float) -> float:
        """Return how far the base method is when the training is so far."""
        return (progress - self.matched) / (1 - self.matched)

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        if progress < self.matched:
            yield from self.match(nets, batch)
        else:
            yield from self.method.step(nets, batch, self.base_progress(progress))

    def match(self, nets: Networks, batch: Batch) -> Iterator[Turn]:
        """Play the turn of stage 0, teacher score matching at diffused data."""
        x0, cond = split_batch(batch)
        t, x_t = diffuse(nets["student"].schedule, x0)
        yield "student", score_matching(nets["student"], nets["teacher"], x_t, t, cond)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        generator = self.method.generator(nets, teacher)
        assert isinstance(generator, Generator)  # a method for classes makes no autoencoder
        if self.students > 1 and teacher.info.task == "class-to-image":
            generator.info = replace(generator.info, shares=[self.share(teacher)])
        return generator

    def finish(self, made: Generator | Autoencoder, data: ImageData) -> Generator | Autoencoder:
        """Tell which clusters of prompts there are, and which is this student's."""
        if isinstance(data, CaptionedFolder) and data.clusters is not None:
            made.info = replace(made.info, clusters=data.clusters)
        return made


# --- clusters of captions and of classes ------------------------------------------------------------------------------
def _encoded(captions: Sequence[str], teacher: Teacher) -> Iterator[Cond]:
    """Encode captions as they are when they are drawn, some at a time."""
    for first in range(0, len(captions), ENCODED):
        cond = teacher.condition.encode({"prompts": captions[first : first + ENCODED]}, torch.device("cpu"))
        assert cond is not None
        yield cond


def class_embeddings(teacher: Teacher) -> Tensor:
    """Return the teacher's class embeddings (N, d), the first that its network has. Raises BadInput if it has none."""
    count = len(teacher.info.labels)
    for _, module in teacher.denoiser.layers():
        if isinstance(module, nn.Embedding) and module.num_embeddings in (count, count + 1):  # with the null class
            return module.weight.detach()[:count]
    kind = type(teacher.denoiser.network).__name__
    raise BadInput(f"{NAME}.partition", "clusters", f"consecutive: this {kind} has no embedding of {count} classes")


def equal_clusters(embeddings: Tensor, clusters: int, rounds: int = 100) -> list[list[int]]:
    """Run k-means with clusters of equal size, to within one: points (N, d) -> the members of each, ascending.

    Every cluster has N / K seats, and each round seats all points at the least total squared distance. The first
    centre is the point farthest from the mean, each next one the farthest from those before it, without randomness.
    Clusters are in the order of their first members. Memory grows with N^2.
    """
    points = embeddings.double().cpu()
    chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < clusters:
        chosen.append(int(torch.cdist(points, points[chosen]).amin(1).argmax()))
    centres, seats, cluster_of = points[chosen], torch.arange(len(points)) % clusters, None
    for _ in range(rounds):
        distance = squared_distances(points, centres)
        _, seat = linear_sum_assignment(distance[:, seats].numpy())
        before, cluster_of = cluster_of, seats[torch.from_numpy(seat)]
        if before is not None and torch.equal(before, cluster_of):
            break
        centres = torch.stack([points[cluster_of == k].mean(0) for k in range(clusters)])
    assert cluster_of is not None
    return sorted((cluster_of == k).nonzero()[:, 0].tolist() for k in range(clusters))
