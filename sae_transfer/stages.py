"""Each stage of a study: what its numbers depend on, and the call that makes them. Config objects stop here."""

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_transfer.analysis import weights
from sae_transfer.analysis.cross_eval import cross_evaluate
from sae_transfer.analysis.instruct import ROLLOUTS_FILE, evaluate_instructions, make_rollouts, threshold_of
from sae_transfer.analysis.metrics import BOOTSTRAP_SEED
from sae_transfer.analysis.norms import choose_threshold, is_outlier
from sae_transfer.analysis.outliers import describe_outliers
from sae_transfer.analysis.site import OneModelAtATime
from sae_transfer.config import ExternalSAE, Finetune, Instruct, SAESpec, Study, require_saes, study_hash
from sae_transfer.errors import StudyError
from sae_transfer.models.conversations import chat_sequences
from sae_transfer.models.pair import (
    TOKENIZER_FILES,
    Checkpoint,
    has_tokenizer,
    layers_to,
    load_model,
    load_tokenizer,
)
from sae_transfer.models.splice import Splicer, open_splicer
from sae_transfer.models.tokens import TokenSet, build_token_set, load_token_set
from sae_transfer.progress import Meter
from sae_transfer.saes.sources import fetch, recorded_identity, same_model
from sae_transfer.saes.store import CONFIG_FILE, WEIGHTS_FILE, StoredSAE, check_fits, load_external, load_own
from sae_transfer.saes.stream import ActivationStream, measure_norm_scale
from sae_transfer.saes.training import Schedule, Trainee, continued_sae, discard_sae, new_sae
from sae_transfer.shared_training import Pass, Task, carry_out, carry_out_at_once
from sae_transfer.study import (
    RunDirectory,
    file_digest,
    replacing,
    sampled_digest,
    scratch_in,
    write_json,
    write_text,
)
from sae_transfer.throughput import Throughput
from sae_transfer.tracking import Tracker

logger = logging.getLogger(__name__)

SIDES = ("base", "chat")
ROLLOUT_ARRAYS = ("sequences.npy", "positions.npy")  # of finetune.data: rollouts
_LOADING = threading.Lock()  # transformers patches global state while it loads a model


class Stages:
    """The stages of one study in one run directory; what several of them need is looked up once."""

    def __init__(
        self,
        study: Study,
        run: RunDirectory,
        checkpoints: dict[str, Checkpoint],
        fingerprints: dict[str, str],
        device: str,
        tracker: Tracker,
        found: Mapping[str, Any],
        *,
        force: bool,
        redo: str | None,
        retry_lr: float | None = None,
    ) -> None:
        """Take what all stages share.

        Args:
            study: The study.
            run: Its run directory, locked.
            checkpoints: `base` and `chat`.
            fingerprints: Of both.
            device: A torch device.
            tracker: Where curves and results go besides the run directory.
            found: What the manifest says of the pair, once a stage has used the models.
            force: Do a stage again whose inputs changed.
            redo: A stage to do again in any case.
            retry_lr: Peak learning rate with which trainings that have a checkpoint go on.
        """
        self._study, self._run, self._force, self._redo, self._retry_lr = study, run, force, redo, retry_lr
        self._checkpoints, self._fingerprints, self._device = checkpoints, fingerprints, device
        self._tracker, self._found = tracker, found
        self._agreement: dict[str, Any] = {}  # of each model's splicer for training with TransformerLens
        on_gpu = device.startswith("cuda")
        asked = study.pair.dtype
        self._training_dtype = ("bfloat16" if on_gpu else "float32") if asked == "auto" else asked
        self._evaluation_dtype = "float32" if asked == "auto" else asked
        self._autocast = study.compute.autocast == "bfloat16" or (study.compute.autocast == "auto" and on_gpu)

    # ---- stages, in order -----------------------------------------------------------------------------------------

    def tokens(self) -> None:
        """Make the token set."""
        study, throughput = self._study, Throughput()

        def work() -> None:
            meter: Meter | None = None

            def progress(done: int, wanted: int) -> None:
                nonlocal meter
                meter = meter or Meter("tokens", wanted, "sequences")
                meter.update(done)

            build_token_set(
                self._run.root / "tokens",
                self._base_tokenizer(),
                **study.tokens.model_dump(),
                n_evaluation_tokens=study.evaluate.tokens,
                n_training_tokens=study.n_training_tokens,
                vocab_size=min(c.config["vocab_size"] for c in self._checkpoints.values()),
                progress=progress,
                throughput=throughput,
            )

        with self._run.exclusively():
            self._stage("tokens", self._token_inputs(), work, throughput=throughput)

    def share(self, leader: "Stages") -> None:
        """Take over the token set and the norm scales of another study's run, where they would be made the same."""
        self._agreement = leader._agreement  # that of the streams, which are the leader's
        with self._run.exclusively():
            if self._token_inputs() == leader._token_inputs():
                source = leader._run.root / "tokens"
                self._stage("tokens", self._token_inputs(), lambda: _link(source, self._run.root / "tokens"))
            inputs = self._scale_inputs()
            if inputs == leader._scale_inputs() and self._run.changed_inputs("scales", inputs) != []:
                scales = (leader._run.root / "scales.json").read_text(encoding="utf-8")
                self._stage("scales", inputs, lambda: write_text(self._run.root / "scales.json", scales))

    def train(self) -> None:
        """Train the SAEs of each model asked for."""
        train([self], self.sides)

    def trains_saes(self) -> bool:
        """Whether the study trains any."""
        if self._study.saes is None:
            logger.info("train: the study trains no SAEs, nothing to do")
        return self._study.saes is not None

    @property
    def sides(self) -> Sequence[str]:
        """Models that get SAEs."""
        return self._study.train.models

    def prepare(self) -> None:
        """Have the token set and the norm scales."""
        self._norm_scales()

    def devices(self, n: int) -> list[str]:
        """As many of this machine's GPUs as there are, at most n; else the one device."""
        if self._device == "cuda" and torch.cuda.device_count() > 1:
            return [f"cuda:{index}" for index in range(min(n, torch.cuda.device_count()))]
        return [self._device]

    def training(self, side: str) -> Task:
        """The SAEs of one model as a task, which studies can share."""
        study, settings = self._study, self._study.train
        specs = study.sae_specs()
        weights_files = [self._run.root / "saes" / f"{side}-{spec.name}" / WEIGHTS_FILE for spec in specs]

        def inputs() -> dict[str, Any]:
            return {
                **self._inputs(side),
                "saes": [[spec.name, spec.options] for spec in specs],
                "train": settings.model_dump(mode="json", exclude={"models", "scale_tokens"}),
                "norm scale": self._norm_scales()[side],
                "dtype": [self._training_dtype, self._autocast],
            }

        def passes() -> list[Pass]:
            n_batches = settings.tokens // settings.batch_size
            warmup = round(settings.l1_warmup * n_batches)

            def trainees(device: str) -> list[Trainee]:
                return [
                    self._trainee(side, "trained", spec, self._fresh(side, spec, warmup, device), None)
                    for spec in specs
                ]

            schedule = Schedule(settings.lr, 0.0, settings.lr_decay)
            return [self._pass(f"train {side}", side, settings.batch_size, n_batches, schedule, trainees)]

        return self._task(f"train-{side}", inputs, passes, "train", weights_files)

    def finetune(self) -> None:
        """Continue the base SAEs on the chat model, one full schedule for each budget; and the controls."""
        finetune([self])

    def finetuning(self) -> Task | None:
        """Fine-tuning and its controls as a task, which studies can share; None when the study has none."""
        study, finetune = self._study, self._study.finetune
        if finetune is None:
            logger.info("finetune: the study has no section finetune, nothing to do")
            return None
        parents = {spec: self._run.root / "saes" / f"base-{spec.name}" for spec in study.sae_specs()}
        roles = ("finetuned", "control") if finetune.control else ("finetuned",)
        made = [path / WEIGHTS_FILE for role in roles for path in self._budgeted_directories(role, *finetune.tokens)]

        def inputs() -> dict[str, Any]:
            self._require("train-base", "the SAEs of the base model are not trained yet", "train")
            return {
                **self._inputs("chat"),
                "parents": {path.name: file_digest(path / WEIGHTS_FILE) for path in parents.values()},
                "finetune": finetune.model_dump(mode="json"),
                "train": [study.train.lr, study.train.l1_warmup, study.train.drop_norm_above],
                "norm scales": self._norm_scales(),
                "dtype": [self._training_dtype, self._autocast],
                "instruct": self._rollout_settings(finetune),
            }

        def trainees(budget: int, device: str) -> Iterator[Trainee]:
            for spec, parent in parents.items():
                # the coefficient as in training, without its warm-up
                sae = continued_sae(parent, self._fresh("chat", spec, 0, device))
                yield self._trainee("finetuned", "finetuned", spec, sae, budget, file_digest(parent / WEIGHTS_FILE))
                if finetune.control:
                    warmup = round(study.train.l1_warmup * (budget // finetune.batch_size))
                    yield self._trainee("chat", "control", spec, self._fresh("chat", spec, warmup, device), budget)

        def passes() -> list[Pass]:
            self._make_rollouts_to_read(finetune)
            schedule = Schedule(study.train.lr, finetune.lr_warmup, finetune.lr_decay)
            return [
                self._pass(
                    f"fine-tune {short_count(budget)}",
                    "chat",
                    finetune.batch_size,
                    budget // finetune.batch_size,
                    schedule,
                    lambda device, budget=budget: list(trainees(budget, device)),
                    finetune,
                )
                for budget in finetune.tokens
            ]

        return self._task("finetune", inputs, passes, "finetune", made)

    def _rollout_settings(self, finetune: Finetune | None) -> dict[str, Any] | None:
        instruct = self._study.instruct
        if finetune is None or finetune.data != "rollouts" or instruct is None:
            return None
        return instruct.model_dump(mode="json")

    def _task(
        self,
        name: str,
        inputs: Callable[[], dict[str, Any]],
        passes: Callable[[], list[Pass]],
        verb: str,
        outputs: Sequence[Path],
    ) -> Task:
        return Task(
            where=str(self._run.root),
            is_due=lambda: self._is_due(name, inputs(), verb=verb, outputs=outputs, discard=discard_sae),
            finish=lambda seconds, throughput: self._finish(name, inputs(), seconds, throughput),
            passes=passes,
        )

    def _pass(
        self,
        label: str,
        side: str,
        batch_size: int,
        n_batches: int,
        schedule: Schedule,
        trainees: Callable[[str], list[Trainee]],
        finetune: Finetune | None = None,
    ) -> Pass:
        study, scale = self._study, self._norm_scales()[side]
        return Pass(
            label=label,
            settings={
                **self._inputs(side),
                "batch_size": batch_size,
                "batches": n_batches,
                "tokens.seed": study.tokens.seed,
                "train.drop_norm_above": study.train.drop_norm_above,
                "train.l1_warmup": study.train.l1_warmup,
                "schedule": astuple(schedule),
                "norm scale": scale,
                "dtype": [self._training_dtype, self._autocast],
                "instruct": self._rollout_settings(finetune),
            },
            open_stream=lambda device, throughput: self._stream(
                side, batch_size, n_batches, finetune, device, throughput
            ),
            trainees=trainees,
            options={
                "schedule": schedule,
                "norm_scale": scale,
                "autocast": self._autocast,
                "checkpoint_every_min": study.compute.checkpoint_every_min,
                "retry_lr": self._retry_lr,
                "force": self._force,
            },
        )

    def cross_eval(self) -> None:
        """Evaluate every SAE on both models."""
        study, evaluate = self._study, self._study.evaluate
        require_saes(study)
        own = self._own_directories()
        scales = self._scales_if_fixed()
        inputs = {
            **self._inputs(*SIDES),
            "evaluate": evaluate.model_dump(mode="json", exclude={"tokens"}),
            "norm scales": scales,
            "dtype": self._evaluation_dtype,
            **self._sae_inputs(own),
        }

        def work() -> None:
            measured = cross_evaluate(
                self._run.root / "cross_eval",
                self._checkpoints,
                self._token_set,
                lambda norm_scales: self._load_saes(own, study.external_saes, norm_scales),
                hook_name=study.site.hook_name,
                norm_scales=scales,
                outlier_threshold=evaluate.outlier_threshold,
                outlier_policies=evaluate.outliers,
                scale_policies=evaluate.scale,
                averaging=evaluate.averaging,
                batch_size=evaluate.batch_size,
                dtype=self._evaluation_dtype,
                device=self._device,
            )
            if scales is None:
                self._write_scales(measured, "the evaluation tokens")

        self._stage("cross-eval", inputs, work, outputs=[self._run.root / "cross_eval" / "rows.csv"])

    def outliers(self) -> None:
        """Norms over the evaluation tokens and what the outliers are; the sweep over thresholds for one SAE a model."""
        study, evaluate = self._study, self._study.evaluate
        # the sweep is about thresholds: the first SAE of each model stands for the others
        there = [path for path in self._trained_directories() if (path / WEIGHTS_FILE).exists()]
        first = {path.name.split("-")[0]: path for path in reversed(there)}
        own = [first[side] for side in SIDES if side in first]
        sides = {} if own else {sae.trained_on: sae for sae in reversed(study.external_saes)}
        external = list(sides.values())
        scales = self._scales_if_fixed()
        inputs = {
            **self._inputs(*SIDES),
            "evaluate": [evaluate.outlier_threshold, "excluded" in evaluate.outliers],
            "norm scales": scales,
            "dtype": self._evaluation_dtype,
            **self._sae_inputs(own),
        }

        def work() -> None:
            tokenizer = self._base_tokenizer()
            measured = describe_outliers(
                self._run.root / "outliers",
                self._checkpoints,
                self._token_set,
                lambda token: tokenizer.decode([token]) if tokenizer else f"<{token}>",
                lambda norm_scales: self._load_saes(own, external, norm_scales),
                hook_name=study.site.hook_name,
                norm_scales=scales,
                outlier_threshold=evaluate.outlier_threshold,
                outlier_policies=evaluate.outliers,
                batch_size=evaluate.batch_size,
                dtype=self._evaluation_dtype,
                device=self._device,
            )
            if scales is None:
                self._write_scales(measured, "the evaluation tokens")

        self._stage("outliers", inputs, work)

    def instruct(self) -> None:
        """Evaluate the SAEs on instructions and the chat model's answers."""
        study, instruct = self._study, self._study.instruct
        if instruct is None:
            logger.info("instruct: the study has no section instruct, nothing to do")
            return
        require_saes(study)
        directory = self._run.root / "instruct"
        self._rollouts(instruct, directory)
        finetuned = self._budgeted_directories("finetuned", max(study.finetune.tokens)) if study.finetune else []
        own = [*self._own_trained(), *finetuned]
        self._require("cross-eval", "the pile is not evaluated yet, which gives scales and threshold", "cross-eval")
        threshold = threshold_of(self._run.root / "cross_eval" / "rows.csv")
        scales = json.loads((self._run.root / "scales.json").read_text(encoding="utf-8"))
        evaluate = study.evaluate
        inputs = {
            "chat model": self._fingerprints["chat"],
            "site": study.site.hook_name,
            "rollouts": file_digest(directory / ROLLOUTS_FILE),
            "sections": instruct.sections,
            "evaluate": [threshold, evaluate.outliers, evaluate.scale],
            "norm scales": [scales[side] for side in SIDES],
            "dtype": self._evaluation_dtype,
            **self._sae_inputs(own),
        }

        def work() -> None:
            evaluate_instructions(
                directory,
                self._checkpoints["chat"],
                self._load_saes(own, study.external_saes, scales),
                sections=instruct.sections,
                hook_name=study.site.hook_name,
                norm_scale=scales["chat"],
                threshold=threshold,
                outlier_policies=evaluate.outliers,
                scale_policies=evaluate.scale,
                batch_size=instruct.batch_size,
                dtype=self._evaluation_dtype,
                device=self._device,
            )

        self._stage("instruct", inputs, work)

    def _rollouts(self, instruct: Instruct, directory: Path) -> None:
        given = Path(instruct.rollouts) if instruct.rollouts else None
        inputs = {
            "chat model": self._fingerprints["chat"],
            "instruct": instruct.model_dump(mode="json", exclude={"sections", "batch_size", "rollouts"}),
            "content of the dataset": dataset_digests(instruct.dataset),
            "given rollouts": file_digest(given) if given else None,
            "tokenizer": fingerprint_of_tokenizer(self._checkpoints["chat"]),
            "dtype": self._evaluation_dtype,
        }

        def work() -> None:
            make_rollouts(
                directory,
                self._checkpoints["chat"],
                dataset=instruct.dataset,
                n=instruct.n,
                seed=instruct.seed,
                template=instruct.template,
                given=given,
                max_new_tokens=instruct.max_new_tokens,
                batch_size=instruct.batch_size,
                dtype=self._evaluation_dtype,
                device=self._device,
            )

        self._stage("rollouts", inputs, work, verb="instruct")

    def weights(self) -> None:
        """Compare the two models' weights, and their activations on the evaluation tokens."""
        study = self._study
        scales = self._scales_if_fixed()
        evaluate = study.evaluate
        inputs = {
            **self._inputs(*SIDES),
            "evaluate": [evaluate.outlier_threshold, "excluded" in evaluate.outliers],
            "norm scales": scales,
            "dtype": self._evaluation_dtype,
        }

        def work() -> None:
            directory = self._run.root / "weights"
            models = OneModelAtATime(self._checkpoints, study.site.hook_name, self._evaluation_dtype, self._device)
            with scratch_in(directory) as scratch:
                sites = models.collect(self._token_set.evaluation, study.evaluate.batch_size, scratch)
                used = scales or {side: site.norm_scale for side, site in sites.items()}
                norms = {side: site.norms * used[side] for side, site in sites.items()}
                threshold = choose_threshold(evaluate.outlier_threshold, evaluate.outliers, norms)
                outliers = np.logical_or(*(is_outlier(site.norms, used[s], threshold) for s, site in sites.items()))
                acts = {side: site.acts for side, site in sites.items()}
                weights.compare(directory, self._checkpoints, acts, norm_scales=used, outliers=outliers)

        self._stage("weights", inputs, work)

    def report(self) -> None:
        """Write tables, figures and the page from what is there; cheap, so done whenever asked."""
        from sae_transfer.report.page import write_report

        write_report(self._run.root)
        self._tracker.log_results(
            self._run.root, [path.parent for path in self._run.root.glob("saes/*/provenance.json")]
        )

    # ---- what stages need -----------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[], None],
        *,
        verb: str | None = None,
        outputs: Sequence[Path] = (),
        throughput: Throughput | None = None,
    ) -> None:
        if self._is_due(name, inputs, verb=verb, outputs=outputs):
            started = time.monotonic()
            work()
            self._finish(name, inputs, time.monotonic() - started, throughput)

    def _is_due(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        verb: str | None = None,
        outputs: Sequence[Path] = (),
        discard: Callable[[Path], None] = lambda directory: None,
    ) -> bool:
        """Whether a stage has to be done: says so when not, refuses changed inputs, forgets the old record."""
        changed = self._run.changed_inputs(name, inputs)
        lost = [path for path in outputs if not path.exists()]
        if changed == [] and lost:
            logger.warning("%s: was done, but %s is gone; doing it again", name, lost[0])
            changed = None
        if changed == [] and self._redo != (verb or name):
            logger.info("%s: done already, nothing to do", name)
            return False
        if changed and not self._force:
            raise StudyError(
                f"{name}: was done in {self._run.root} with other inputs; changed since: {', '.join(changed)}",
                "--force to do it again there, or --out DIR to keep both",
            )
        self._run.adopt(self._study)
        if changed is not None:  # to be done anew, also if that is cut and continued: so before the record goes
            for path in outputs:
                discard(path.parent)
        self._run.forget(name)
        return True

    def _finish(
        self, name: str, inputs: Mapping[str, Any], seconds: float, throughput: Throughput | None = None
    ) -> None:
        self._run.finish(name, inputs, seconds)
        entries = self._provenance()
        if name != "tokens":  # which are made before any model has been seen to be sound
            entries |= {**self._found, "site_agreement": self._agreement}
        rates = throughput.rates() if throughput else {}
        if rates:
            entries["throughput"] = {name: rates}
            logger.info("%s: %s", name, throughput)
        self._run.update_manifest(**entries)
        logger.info("%s: done in %.0f s", name, seconds)

    def _require(self, stage: str, problem: str, verb: str) -> None:
        if self._run.record(stage) is None:
            raise StudyError(
                f"{self._run.root}: {problem}", f"sae-transfer {verb} CONFIG, or sae-transfer run CONFIG for everything"
            )

    @cached_property
    def _token_set(self) -> TokenSet:
        if self._run.changed_inputs("tokens", self._token_inputs()) != []:
            self.tokens()
        return load_token_set(self._run.root / "tokens")

    def _base_tokenizer(self) -> Any:
        base = self._checkpoints["base"]
        return load_tokenizer(base) if has_tokenizer(base) else None

    def _token_inputs(self) -> dict[str, Any]:
        return {
            "tokens": self._study.tokens.model_dump(mode="json"),
            "evaluate.tokens": self._study.evaluate.tokens,
            "training tokens": self._study.n_training_tokens,
            "content of the dataset": dataset_digests(self._study.tokens.dataset),
            "tokenizer of the base model": fingerprint_of_tokenizer(self._checkpoints["base"]),
        }

    def _inputs(self, *sides: str) -> dict[str, Any]:
        return {
            "token set": self._token_set.fingerprint,
            **{f"{side} model": self._fingerprints[side] for side in sides},
            "site": self._study.site.hook_name,
        }

    def _sae_inputs(self, own: Sequence[Path]) -> dict[str, Any]:
        return {
            "SAEs": {path.name: file_digest(path / WEIGHTS_FILE) for path in own},
            "external SAEs": {
                sae.name: [sae.trained_on, sae.scale, sae.accept_mismatch, self._external_digest(sae)]
                for sae in self._study.external_saes
            },
        }

    def _scales_if_fixed(self) -> dict[str, float] | None:
        """c_m of both models; None when they are to be measured on the evaluation tokens."""
        return None if self._study.saes is None and self._study.norm_scale is None else self._norm_scales()

    def _norm_scales(self) -> dict[str, float]:
        """c_m of both models: given, or measured once on the first training tokens and kept in scales.json."""
        given = self._study.norm_scale
        path = self._run.root / "scales.json"
        inputs = self._scale_inputs()

        def work() -> None:
            if given is not None:
                self._write_scales(given.model_dump(), "the study file")
                return
            scales = {}
            sequences = self._token_set.training[: -(-self._n_scale_tokens // self._token_set.context_size)]
            for side, checkpoint in self._checkpoints.items():
                logger.info("norm scale of %s: measuring on %s tokens", side, f"{sequences.size:,}")
                # unnamed, so that the first model's memory is free before the second one is loaded
                scales[side] = measure_norm_scale(
                    self._splicer_for_training(side, self._device), sequences, checkpoint.d_model, self._device
                )
            self._write_scales(scales, f"the first {sequences.size} training tokens")

        if self._run.changed_inputs("scales", inputs) != []:
            with self._run.exclusively():
                self._stage("scales", inputs, work)
        return {side: json.loads(path.read_text(encoding="utf-8"))[side] for side in SIDES}

    @property
    def _n_scale_tokens(self) -> int:
        return min(self._study.train.scale_tokens, self._study.train.tokens)

    def _scale_inputs(self) -> dict[str, Any]:
        given = self._study.norm_scale
        return {
            **self._inputs(*SIDES),
            "norm_scale": given.model_dump() if given else None,
            "train.scale_tokens": self._n_scale_tokens,
            "dtype": self._training_dtype,
        }

    def _splicer_for_training(self, side: str, device: str) -> Splicer:
        """One model as far as the site; the manifest will say how it is cut there, and how exactly."""
        checkpoint, hook_name = self._checkpoints[side], self._study.site.hook_name
        layers = layers_to(hook_name, checkpoint.n_layers)
        with _LOADING:
            model = load_model(checkpoint, dtype=self._training_dtype, device=device, layers=layers)
            splicer = open_splicer(model, hook_name, checkpoint)
        difference = splicer.difference
        self._agreement[side] = {
            "path": "restart" if splicer.restarts else "whole passes",
            "dtype": self._training_dtype,
            "difference": difference if difference is not None and math.isfinite(difference) else None,
        }
        return splicer

    def _write_scales(self, scales: Mapping[str, float], source: str) -> None:
        write_json(self._run.root / "scales.json", {**scales, "measured_on": source})

    def _stream(
        self,
        side: str,
        batch_size: int,
        n_batches: int,
        finetune: Finetune | None,
        device: str,
        throughput: Throughput,
    ) -> ActivationStream:
        sequences, positions = self._sequences(finetune)
        return ActivationStream(
            self._splicer_for_training(side, device),
            sequences,
            positions=positions,
            d_model=self._checkpoints[side].d_model,
            norm_scale=self._norm_scales()[side],
            batch_size=batch_size,
            n_batches=n_batches,
            seed=self._study.tokens.seed,
            drop_norm_above=self._study.train.drop_norm_above,
            device=device,
            prefetches=device.startswith("cuda"),
            throughput=throughput,
        )

    def _fresh(self, side: str, spec: SAESpec, sparsity_warmup_steps: int, device: str) -> Any:
        study = self._study
        return new_sae(
            spec.architecture,
            d_in=self._checkpoints[side].d_model,
            d_sae=spec.d_sae,
            sparsity_key=spec.sparsity_key,
            sparsity_value=spec.sparsity_value,
            seed=spec.seed,
            sparsity_warmup_steps=sparsity_warmup_steps,
            options=spec.options,
            metadata={
                "model_name": getattr(study.pair, side),
                "hook_name": study.site.hook_name,
                "context_size": self._token_set.context_size,
                "prepend_bos": study.tokens.prepend_bos,
                "dataset_path": self._token_set.dataset,
            },
            device=device,
        )

    def _trainee(
        self, trained_on: str, role: str, spec: SAESpec, sae: Any, budget: int | None, parent: str | None = None
    ) -> Trainee:
        identity = {"role": role, "SAE": [spec.name, spec.options], "parent": parent}
        provenance = {
            "trained_on": trained_on,
            "role": role,
            "architecture": spec.architecture,
            "d_sae": spec.d_sae,
            "sparsity_key": spec.sparsity_key,
            "sparsity_value": spec.sparsity_value,
            "seed": spec.seed,
            "parent": f"base-{spec.name}" if role == "finetuned" else None,
            "data": self._study.finetune.data if budget and self._study.finetune else "tokens",
            "study_hash": self._study_hash(),
        }
        name = f"{trained_on}-{spec.name}" if budget is None else f"{role}-{spec.name}-{short_count(budget)}"
        return Trainee(self._run.root / "saes" / name, sae, provenance, identity, self._tracker.log_curve)

    def _sequences(self, finetune: Finetune | None) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        """What the model reads while SAEs are trained, and which of its positions count."""
        if self._rollout_settings(finetune) is None:
            return self._token_set.training, None
        directory = self._run.root / "finetune"
        sequences, positions = (np.load(directory / name, mmap_mode="r") for name in ROLLOUT_ARRAYS)
        return sequences, positions

    def _make_rollouts_to_read(self, finetune: Finetune) -> None:
        """The chat model's answers on which its activations are taken: kept, since they take long to make."""
        instruct = self._study.instruct
        if finetune.data == "tokens" or instruct is None:
            return
        n_tokens = max(finetune.tokens)
        inputs = {
            "chat model": self._fingerprints["chat"],
            "instruct": self._rollout_settings(finetune),
            "content of the dataset": dataset_digests(instruct.dataset),
            "tokenizer": fingerprint_of_tokenizer(self._checkpoints["chat"]),
            "finetune.tokens": n_tokens,
            "dtype": self._evaluation_dtype,
        }

        def work() -> None:
            checkpoint = self._checkpoints["chat"]
            made = chat_sequences(
                load_model(checkpoint, dtype=self._evaluation_dtype, device=self._device),
                load_tokenizer(checkpoint),
                dataset=instruct.dataset,
                n_held_out=instruct.n,
                seed=instruct.seed,
                template=instruct.template,
                max_new_tokens=instruct.max_new_tokens,
                batch_size=instruct.batch_size,
                n_tokens=n_tokens,
                progress=Meter("rollouts to fine-tune on", n_tokens, "tokens").update,
            )
            for name, array in zip(ROLLOUT_ARRAYS, made, strict=True):
                with replacing(self._run.root / "finetune" / name) as file, file.open("wb") as handle:
                    np.save(handle, array)

        self._stage("finetune-rollouts", inputs, work, verb="finetune")

    def _trained_directories(self) -> list[Path]:
        names = [f"{side}-{spec.name}" for side in self._study.train.models for spec in self._study.sae_specs()]
        return [self._run.root / "saes" / name for name in names]

    def _budgeted_directories(self, role: str, *budgets: int) -> list[Path]:
        names = [f"{role}-{spec.name}-{short_count(b)}" for b in budgets for spec in self._study.sae_specs()]
        return [self._run.root / "saes" / name for name in names]

    def _own_trained(self) -> list[Path]:
        """The directories of the study's trained SAEs, once all of them are."""
        if self._study.saes is None:
            return []
        for side in self._study.train.models:
            self._require(f"train-{side}", f"the SAEs of the {side} model are not trained yet", "train")
        trained = self._trained_directories()
        for path in trained:
            if not (path / WEIGHTS_FILE).exists():
                raise StudyError(f"{path}: its weights are gone", "sae-transfer train CONFIG makes them again")
        return trained

    def _own_directories(self) -> list[Path]:
        """Those, and the fine-tuned ones and controls, once all of them are trained."""
        own, finetune = self._own_trained(), self._study.finetune
        if finetune is None:
            return own
        self._require("finetune", "the base SAEs are not fine-tuned yet", "finetune")
        own += self._budgeted_directories("finetuned", *finetune.tokens)
        return own + (self._budgeted_directories("control", *finetune.tokens) if finetune.control else [])

    def _load_saes(
        self, own: Sequence[Path], external: Sequence[ExternalSAE], norm_scales: Mapping[str, float]
    ) -> list[StoredSAE]:
        d_model, hook_name = self._checkpoints["base"].d_model, self._study.site.hook_name
        saes = [load_own(path, self._device) for path in own]
        for sae, path in zip(saes, own, strict=True):
            check_fits(sae, d_model, hook_name, path)
        for asked in external:
            path = self._external_directory(asked)
            scale = norm_scales[asked.trained_on]
            sae = load_external(asked.name, asked.trained_on, path, asked.scale, scale, self._device)
            check_fits(sae, d_model, hook_name, path, accept_mismatch=asked.accept_mismatch)
            if not asked.accept_mismatch:
                self._refuse_other_model(asked, sae)
            saes.append(sae)
        return saes

    def _refuse_other_model(self, asked: ExternalSAE, sae: StoredSAE) -> None:
        recorded, _ = recorded_identity(sae.sae.cfg.to_dict())
        checkpoint = self._checkpoints[asked.trained_on]
        if recorded is not None and not same_model(recorded, checkpoint.source, checkpoint.config.get("_name_or_path")):
            raise StudyError(
                f"external_saes.{asked.name}: was trained on {recorded}; the study's {asked.trained_on} model is"
                f" {checkpoint.source}",
                "correct trained_on or the pair, or set accept_mismatch: true on this SAE",
            )

    def _external_directory(self, sae: ExternalSAE) -> Path:
        """Where an SAE from elsewhere lies in SAELens's present form; fetched and converted once, into the run."""
        cache = self._run.root / "saes" / "external"
        if sae.path is not None:
            return fetch(sae.path, cache)
        assert sae.release is not None
        return fetch(sae.release, cache, sae_id=sae.id)

    def _external_digest(self, sae: ExternalSAE) -> list[str]:
        directory = self._external_directory(sae)
        return [file_digest(directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]

    def _study_hash(self) -> str:
        return study_hash(self._study, {**self._fingerprints, "tokens": self._token_set.fingerprint})

    def _provenance(self) -> dict[str, Any]:
        return {
            "study_hash": self._study_hash(),
            "models": {
                side: {"source": c.source, "revision": c.revision, "class": c.model_class}
                for side, c in self._checkpoints.items()
            },
            "token_set": {
                "fingerprint": self._token_set.fingerprint,
                "dataset": self._token_set.dataset,
                "bos_token_id": self._token_set.bos_token_id,
            },
            "seeds": {
                "tokens": self._study.tokens.seed,
                "saes": sorted({spec.seed for spec in self._study.sae_specs()}),
                "bootstrap": BOOTSTRAP_SEED,
            },
            "device": torch.cuda.get_device_name() if self._device.startswith("cuda") else self._device,
        }


def train(group: Sequence[Stages], sides: Sequence[str]) -> None:
    """Train the SAEs of one or several studies; both models at once where there are two GPUs.

    Args:
        group: Studies that share models, site, token set and the settings of training.
        sides: Of `base`, `chat`.

    Raises:
        StudyError: They cannot share a stream, or an SAE failed; the others are stored.
    """
    group = [stages for stages in group if stages.trains_saes()]
    if not group:
        return
    _prepare(group)
    task_lists = [[stages.training(side) for stages in group if side in stages.sides] for side in sides]
    devices = group[0].devices(len(sides))
    if len(devices) > 1:
        carry_out_at_once(task_lists, devices)
        return
    for tasks in task_lists:
        carry_out(tasks, devices[0])


def finetune(group: Sequence[Stages]) -> None:
    """Fine-tune the base SAEs of one or several studies, and train their controls.

    Args:
        group: Studies that share models, site, token set and the settings of fine-tuning.

    Raises:
        StudyError: They cannot share a stream, or an SAE failed; the others are stored.
    """
    tasks = [task for task in (stages.finetuning() for stages in group) if task is not None]
    if tasks:
        _prepare(group)
        carry_out(tasks, group[0].devices(1)[0])


def _prepare(group: Sequence[Stages]) -> None:
    """Make the token set and the norm scales once, for all that share them."""
    leader, *others = group
    leader.prepare()
    for stages in others:
        stages.share(leader)
        stages.prepare()


def _link(source: Path, target: Path) -> None:
    """Copy a directory of files that never change: as links where the file system has them."""

    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)

    with replacing(target) as directory:
        shutil.copytree(source, directory, copy_function=link)


def short_count(n_tokens: int) -> str:
    """A count as a study file says it: 5M, 50k, 98304."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if n_tokens % size == 0:
            return f"{n_tokens // size}{unit}"
    return str(n_tokens)


def dataset_digests(dataset: str) -> dict[str, str]:
    """Digests of a local dataset's files by name; none of what lies elsewhere."""
    path = Path(dataset)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.name: sampled_digest(file) for file in files if file.is_file()}


def fingerprint_of_tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of the files that decide how text becomes ids."""
    files = [checkpoint.directory / name for name in TOKENIZER_FILES]
    return {file.name: file_digest(file) for file in files if file.is_file()}
