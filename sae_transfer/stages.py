"""Each stage of a study: what its numbers depend on, and the call that makes them. Config objects stop here."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from sae_transfer.models.pair import TOKENIZER_FILES, Checkpoint, has_tokenizer, load_model, load_tokenizer
from sae_transfer.models.splice import open_splicer
from sae_transfer.models.tokens import TokenSet, build_token_set, load_token_set
from sae_transfer.progress import Meter
from sae_transfer.saes.sources import fetch, recorded_identity, same_model
from sae_transfer.saes.store import CONFIG_FILE, WEIGHTS_FILE, StoredSAE, check_fits, load_external, load_own
from sae_transfer.saes.stream import ActivationStream, measure_norm_scale
from sae_transfer.saes.training import Schedule, Trainee, continued_sae, new_sae, train_saes
from sae_transfer.study import RunDirectory, file_digest, sampled_digest, write_json
from sae_transfer.tracking import Tracker

logger = logging.getLogger(__name__)

SIDES = ("base", "chat")


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
        """
        self._study, self._run, self._force, self._redo = study, run, force, redo
        self._checkpoints, self._fingerprints, self._device = checkpoints, fingerprints, device
        self._tracker, self._found = tracker, found
        on_gpu = device.startswith("cuda")
        asked = study.pair.dtype
        self._training_dtype = ("bfloat16" if on_gpu else "float32") if asked == "auto" else asked
        self._evaluation_dtype = "float32" if asked == "auto" else asked
        self._autocast = study.compute.autocast == "bfloat16" or (study.compute.autocast == "auto" and on_gpu)

    # ---- stages, in order -----------------------------------------------------------------------------------------

    def tokens(self) -> None:
        """Make the token set."""
        study = self._study

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
            )

        self._stage("tokens", self._token_inputs(), work)

    def train(self) -> None:
        """Train the SAEs of each model asked for."""
        if self._study.saes is None:
            logger.info("train: the study trains no SAEs, nothing to do")
            return
        for side in self._study.train.models:
            self._train_side(side)

    def _train_side(self, side: str) -> None:
        study, train = self._study, self._study.train
        scale = self._norm_scales()[side]
        specs = study.sae_specs()
        inputs = {
            **self._inputs(side),
            "saes": [[spec.name, spec.options] for spec in specs],
            "train": train.model_dump(mode="json", exclude={"models", "scale_tokens"}),
            "norm scale": scale,
            "dtype": [self._training_dtype, self._autocast],
        }

        def work() -> None:
            n_batches = train.tokens // train.batch_size
            stream = self._stream(side, self._token_set.training, None, train.batch_size, n_batches)
            warmup = round(train.l1_warmup * n_batches)
            trainees = [self._trainee(side, "trained", spec, self._fresh(side, spec, warmup), None) for spec in specs]
            self._train_on(trainees, stream, Schedule(train.lr, 0.0, train.lr_decay), side, f"train {side}")

        weights_files = [self._run.root / "saes" / f"{side}-{spec.name}" / WEIGHTS_FILE for spec in specs]
        self._stage(f"train-{side}", inputs, work, verb="train", outputs=weights_files)

    def finetune(self) -> None:
        """Continue the base SAEs on the chat model, one full schedule for each budget; and the controls."""
        study, finetune = self._study, self._study.finetune
        if finetune is None:
            logger.info("finetune: the study has no section finetune, nothing to do")
            return
        parents = {spec: self._run.root / "saes" / f"base-{spec.name}" for spec in study.sae_specs()}
        self._require("train-base", "the SAEs of the base model are not trained yet", "train")
        scales = self._norm_scales()
        inputs = {
            **self._inputs("chat"),
            "parents": {path.name: file_digest(path / WEIGHTS_FILE) for path in parents.values()},
            "finetune": finetune.model_dump(mode="json"),
            "train": [study.train.lr, study.train.l1_warmup, study.train.drop_norm_above],
            "norm scales": scales,
            "dtype": [self._training_dtype, self._autocast],
            "instruct": study.instruct.model_dump(mode="json")
            if finetune.data == "rollouts" and study.instruct
            else None,
        }

        def work() -> None:
            sequences, positions = self._finetuning_sequences(finetune)
            for budget in finetune.tokens:
                n_batches = budget // finetune.batch_size
                stream = self._stream("chat", sequences, positions, finetune.batch_size, n_batches)
                trainees = []
                for spec, parent in parents.items():
                    # the coefficient as in training, without its warm-up
                    sae = continued_sae(parent, self._fresh("chat", spec, 0))
                    trainees.append(self._trainee("finetuned", "finetuned", spec, sae, budget))
                    if finetune.control:
                        fresh = self._fresh("chat", spec, round(study.train.l1_warmup * n_batches))
                        trainees.append(self._trainee("chat", "control", spec, fresh, budget))
                schedule = Schedule(study.train.lr, finetune.lr_warmup, finetune.lr_decay)
                self._train_on(trainees, stream, schedule, "chat", f"fine-tune {short_count(budget)}")

        roles = ("finetuned", "control") if finetune.control else ("finetuned",)
        made = [path / WEIGHTS_FILE for role in roles for path in self._budgeted_directories(role, *finetune.tokens)]
        self._stage("finetune", inputs, work, outputs=made)

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
            directory.mkdir(parents=True, exist_ok=True)
            models = OneModelAtATime(self._checkpoints, study.site.hook_name, self._evaluation_dtype, self._device)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".activations.") as scratch:
                sites = models.collect(self._token_set.evaluation, study.evaluate.batch_size, Path(scratch))
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
    ) -> None:
        changed = self._run.changed_inputs(name, inputs)
        lost = [path for path in outputs if not path.exists()]
        if changed == [] and lost:
            logger.warning("%s: was done, but %s is gone; doing it again", name, lost[0])
            changed = None
        if changed == [] and self._redo != (verb or name):
            logger.info("%s: done already, nothing to do", name)
            return
        if changed and not self._force:
            raise StudyError(
                f"{name}: was done in {self._run.root} with other inputs; changed since: {', '.join(changed)}",
                "--force to do it again there, or --out DIR to keep both",
            )
        self._run.adopt(self._study)
        self._run.forget(name)
        started = time.monotonic()
        work()
        seconds = time.monotonic() - started
        self._run.finish(name, inputs, seconds)
        # tokens are made before any model has been seen to be sound
        self._run.update_manifest(**self._provenance(), **({} if name == "tokens" else self._found))
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
        study, given = self._study, self._study.norm_scale
        path = self._run.root / "scales.json"
        n_tokens = min(study.train.scale_tokens, study.train.tokens)
        inputs = {
            **self._inputs(*SIDES),
            "norm_scale": given.model_dump() if given else None,
            "train.scale_tokens": n_tokens,
            "dtype": self._training_dtype,
        }

        def work() -> None:
            if given is not None:
                self._write_scales(given.model_dump(), "the study file")
                return
            scales = {}
            sequences = self._token_set.training[: -(-n_tokens // self._token_set.context_size)]
            for side, checkpoint in self._checkpoints.items():
                logger.info("norm scale of %s: measuring on %s tokens", side, f"{sequences.size:,}")
                model = load_model(checkpoint, dtype=self._training_dtype, device=self._device)
                splicer = open_splicer(model, study.site.hook_name, checkpoint)
                scales[side] = measure_norm_scale(splicer, sequences, checkpoint.d_model, self._device)
            self._write_scales(scales, f"the first {sequences.size} training tokens")

        if self._run.changed_inputs("scales", inputs) != []:
            self._stage("scales", inputs, work)
        return {side: json.loads(path.read_text(encoding="utf-8"))[side] for side in SIDES}

    def _write_scales(self, scales: Mapping[str, float], source: str) -> None:
        write_json(self._run.root / "scales.json", {**scales, "measured_on": source})

    def _stream(
        self,
        side: str,
        sequences: NDArray[np.integer],
        positions: NDArray[np.bool_] | None,
        batch_size: int,
        n_batches: int,
    ) -> ActivationStream:
        checkpoint = self._checkpoints[side]
        model = load_model(checkpoint, dtype=self._training_dtype, device=self._device)
        return ActivationStream(
            open_splicer(model, self._study.site.hook_name, checkpoint),
            sequences,
            positions=positions,
            d_model=checkpoint.d_model,
            norm_scale=self._norm_scales()[side],
            batch_size=batch_size,
            n_batches=n_batches,
            seed=self._study.tokens.seed,
            drop_norm_above=self._study.train.drop_norm_above,
            device=self._device,
        )

    def _train_on(
        self, trainees: list[Trainee], stream: ActivationStream, schedule: Schedule, side: str, label: str
    ) -> None:
        train_saes(
            trainees,
            stream,
            schedule,
            norm_scale=self._norm_scales()[side],
            autocast=self._autocast,
            device=self._device,
            label=label,
            on_log=self._tracker.log_curve,
        )

    def _fresh(self, side: str, spec: SAESpec, sparsity_warmup_steps: int) -> Any:
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
            device=self._device,
        )

    def _trainee(self, trained_on: str, role: str, spec: SAESpec, sae: Any, budget: int | None) -> Trainee:
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
        return Trainee(self._run.root / "saes" / name, sae, provenance)

    def _finetuning_sequences(self, finetune: Finetune) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
        """What the chat model reads while base SAEs are fine-tuned, and which of its positions count."""
        instruct = self._study.instruct
        if finetune.data == "tokens" or instruct is None:
            return self._token_set.training, None
        checkpoint = self._checkpoints["chat"]
        n_tokens = max(finetune.tokens)
        meter = Meter("rollouts to fine-tune on", n_tokens, "tokens")
        return chat_sequences(
            load_model(checkpoint, dtype=self._evaluation_dtype, device=self._device),
            load_tokenizer(checkpoint),
            dataset=instruct.dataset,
            n_held_out=instruct.n,
            seed=instruct.seed,
            template=instruct.template,
            max_new_tokens=instruct.max_new_tokens,
            batch_size=instruct.batch_size,
            n_tokens=n_tokens,
            progress=meter.update,
        )

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
