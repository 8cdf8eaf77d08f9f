"""What the stages of one study share: its run directory, token set, scales and models, and how a stage is recorded."""

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_transfer.analysis.metrics import BOOTSTRAP_SEED
from sae_transfer.analysis.site import OneModelAtATime
from sae_transfer.config import SIDES, Study, study_hash
from sae_transfer.errors import StudyError
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
from sae_transfer.saes.stream import measure_norm_scale
from sae_transfer.study import (
    RunDirectory,
    file_digest,
    replacing,
    sampled_digest,
    write_json,
    write_text,
)
from sae_transfer.throughput import Throughput
from sae_transfer.tracking import Tracker

logger = logging.getLogger(__name__)

_LOADING = threading.Lock()  # transformers patches global state while it loads a model


class Context:
    """One study in its run directory; what several stages need is looked up once."""

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
        self.study, self.run, self.force, self.redo, self.retry_lr = study, run, force, redo, retry_lr
        self.checkpoints, self.fingerprints, self.device = checkpoints, fingerprints, device
        self.tracker, self.found = tracker, found
        self._agreement: dict[str, Any] = {}  # of splicers with TransformerLens
        self._rates: dict[str, str] = {}  # of the stages done
        on_gpu = device.startswith("cuda")
        asked = study.pair.dtype
        self.training_dtype = ("bfloat16" if on_gpu else "float32") if asked == "auto" else asked
        self.evaluation_dtype = "float32" if asked == "auto" else asked
        self.autocast = study.compute.autocast == "bfloat16" or (study.compute.autocast == "auto" and on_gpu)

    def tokens(self) -> None:
        """Make the token set."""
        study, throughput = self.study, Throughput()

        def work() -> None:
            meter: Meter | None = None

            def progress(done: int, wanted: int) -> None:
                nonlocal meter
                meter = meter or Meter("tokens", wanted, "sequences")
                meter.update(done)

            # told here, since the manifest names it before there is a record to find it by
            self.token_set = build_token_set(
                self.run.root / "tokens",
                self.base_tokenizer(),
                **study.tokens.model_dump(),
                n_evaluation_tokens=study.evaluate.tokens,
                n_training_tokens=study.n_training_tokens,
                vocab_size=min(c.config["vocab_size"] for c in self.checkpoints.values()),
                progress=progress,
                throughput=throughput,
            )

        with self.run.exclusively():
            self.stage("tokens", self.token_inputs(), work, throughput=throughput)

    def share(self, leader: "Context") -> None:
        """Take over the token set and the norm scales of another study's run, where they would be made the same."""
        self._agreement = leader._agreement  # that of the streams, which are the leader's
        with self.run.exclusively():
            if self.token_inputs() == leader.token_inputs():
                self.stage("tokens", self.token_inputs(), lambda: self._take_tokens(leader.run.root / "tokens"))
            inputs = self.scale_inputs()
            if inputs == leader.scale_inputs() and self.run.changed_inputs("scales", inputs) != []:
                scales = (leader.run.root / "scales.json").read_text(encoding="utf-8")
                self.stage("scales", inputs, lambda: write_text(self.run.root / "scales.json", scales))

    def _take_tokens(self, source: Path) -> None:
        _link(source, self.run.root / "tokens")
        self.token_set = load_token_set(self.run.root / "tokens")

    def devices(self, n: int) -> list[str]:
        """As many of this machine's GPUs as there are, at most n; else the one device.

        Only for bfloat16: the steps of one training would put a float32 model in another thread into TF32 at times.
        """
        if self.device == "cuda" and self.training_dtype == "bfloat16" and torch.cuda.device_count() > 1:
            return [f"cuda:{index}" for index in range(min(n, torch.cuda.device_count()))]
        return [self.device]

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[], None],
        *,
        verb: str | None = None,
        outputs: Sequence[Path] = (),
        throughput: Throughput | None = None,
    ) -> None:
        """Do a stage unless it is done, and record it."""
        if self.is_due(name, inputs, verb=verb, outputs=outputs):
            self.adopt()
            started = time.monotonic()
            work()
            self.finish(name, inputs, time.monotonic() - started, throughput)

    def is_due(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        verb: str | None = None,
        outputs: Sequence[Path] = (),
        discard: Callable[[Path], None] = lambda directory: None,
    ) -> bool:
        """Whether a stage has to be done: says so when not, refuses changed inputs, forgets the old record."""
        changed = self.run.changed_inputs(name, inputs)
        lost = [path for path in outputs if not path.exists()]
        if changed == [] and lost:
            logger.warning("%s: was done, but %s is gone; doing it again", name, lost[0])
            changed = None
        if changed == [] and self.redo != (verb or name):
            logger.info("%s: done already, nothing to do", name)
            return False
        if changed and not self.force:
            raise StudyError(
                f"{name}: was done in {self.run.root} with other inputs; changed since: {', '.join(changed)}",
                "--force to do it again there, or --out DIR to keep both",
            )
        if changed is not None:  # to be done anew, also if that is cut and continued: so before the record goes
            for path in outputs:
                discard(path.parent)
        self.run.forget(name)
        return True

    def adopt(self) -> None:
        """From now on, what is done in the run directory is done for this study: nothing there refuses it."""
        self.run.adopt(self.study)

    def finish(
        self, name: str, inputs: Mapping[str, Any], seconds: float, throughput: Throughput | None = None
    ) -> None:
        """Put what a stage found into the manifest, and record the stage as done."""
        entries = self._provenance()
        if name != "tokens":  # which are made before any model has been seen to be sound
            entries |= {**self.found, "site_agreement": self._agreement}
        rates = throughput.rates() if throughput else {}
        if rates:
            entries["throughput"] = {name: rates}
            self._rates[name] = str(throughput)
            logger.info("%s: %s", name, throughput)
        self.run.update_manifest(**entries)
        self.run.finish(name, inputs, seconds)
        logger.info("%s: done in %.0f s", name, seconds)

    def say_rates(self) -> None:
        """Say at the end, after all else, how fast the parts of the stages went that were done now."""
        for name, rates in self._rates.items():
            logger.info("speed of %s: %s", name, rates)

    def require(self, stage: str, problem: str, verb: str) -> None:
        """Refuse to go on without the record of an earlier stage."""
        if self.run.record(stage) is None:
            raise StudyError(
                f"{self.run.root}: {problem}", f"sae-transfer {verb} CONFIG, or sae-transfer run CONFIG for everything"
            )

    @cached_property
    def token_set(self) -> TokenSet:
        """The token set, made if it is not there."""
        if self.run.changed_inputs("tokens", self.token_inputs()) != []:
            self.tokens()
        return load_token_set(self.run.root / "tokens")

    def base_tokenizer(self) -> Any:
        """The base model's tokenizer; None where token ids are given and it has none."""
        base = self.checkpoints["base"]
        return load_tokenizer(base) if has_tokenizer(base) else None

    def token_inputs(self) -> dict[str, Any]:
        """What the token set depends on."""
        return {
            "tokens": self.study.tokens.model_dump(mode="json"),
            "evaluate.tokens": self.study.evaluate.tokens,
            "training tokens": self.study.n_training_tokens,
            "content of the dataset": dataset_digests(self.study.tokens.dataset),
            "tokenizer of the base model": fingerprint_of_tokenizer(self.checkpoints["base"]),
        }

    def inputs(self, *sides: str) -> dict[str, Any]:
        """What most stages depend on: the token set, models, the site."""
        return {
            "token set": self.token_set.fingerprint,
            **{f"{side} model": self.fingerprints[side] for side in sides},
            "site": self.study.site.hook_name,
        }

    def scales_if_fixed(self) -> dict[str, float] | None:
        """c_m of both models; None when they are to be measured on the evaluation tokens."""
        return None if self.study.saes is None and self.study.norm_scale is None else self.norm_scales()

    def norm_scales(self) -> dict[str, float]:
        """c_m of both models: given, or measured once on the first training tokens and kept in scales.json."""
        given = self.study.norm_scale
        path = self.run.root / "scales.json"
        inputs = self.scale_inputs()

        def work() -> None:
            if given is not None:
                self.write_scales(given.model_dump(), "the study file")
                return
            scales = {}
            sequences = self.token_set.training[: -(-self._n_scale_tokens // self.token_set.context_size)]
            for side, checkpoint in self.checkpoints.items():
                logger.info("norm scale of %s: measuring on %s tokens", side, f"{sequences.size:,}")
                # unnamed, so that the first model's memory is free before the second one is loaded
                scales[side] = measure_norm_scale(
                    self.splicer_for_training(side, self.device), sequences, checkpoint.d_model, self.device
                )
            self.write_scales(scales, f"the first {sequences.size} training tokens")

        if self.run.changed_inputs("scales", inputs) != []:
            with self.run.exclusively():
                self.stage("scales", inputs, work)
        return {side: json.loads(path.read_text(encoding="utf-8"))[side] for side in SIDES}

    @property
    def _n_scale_tokens(self) -> int:
        return min(self.study.train.scale_tokens, self.study.train.tokens)

    def scale_inputs(self) -> dict[str, Any]:
        """What the norm scales depend on."""
        given = self.study.norm_scale
        return {
            **self.inputs(*SIDES),
            "norm_scale": given.model_dump() if given else None,
            "train.scale_tokens": self._n_scale_tokens,
            "dtype": self.training_dtype,
        }

    def write_scales(self, scales: Mapping[str, float], source: str) -> None:
        """Keep norm scales in scales.json."""
        write_json(self.run.root / "scales.json", {**scales, "measured_on": source})

    def splicer_for_training(self, side: str, device: str) -> Splicer:
        """One model as far as the site."""
        layers = layers_to(self.study.site.hook_name, self.checkpoints[side].n_layers)
        return self._splicer(side, "training", self.training_dtype, device, layers)

    def models_for_evaluation(self) -> OneModelAtATime:
        """Both models, whole, of which one is in memory."""
        return OneModelAtATime(
            self.checkpoints,
            lambda side: self._splicer(side, "evaluation", self.evaluation_dtype, self.device),
            self.device,
        )

    def _splicer(self, side: str, purpose: str, dtype: str, device: str, layers: int | None = None) -> Splicer:
        """One model cut at the site; the manifest will say how for this purpose, and how exactly."""
        checkpoint, hook_name = self.checkpoints[side], self.study.site.hook_name
        with _LOADING:
            model = load_model(checkpoint, dtype=dtype, device=device, layers=layers)
            splicer = open_splicer(model, hook_name, checkpoint)
        difference = splicer.difference
        self._agreement[f"{side}-{purpose}"] = {
            "path": "restart" if splicer.restarts else "whole passes",
            "dtype": dtype,
            "difference": difference if difference is not None and math.isfinite(difference) else None,
        }
        return splicer

    def study_hash(self) -> str:
        """Hash of the study with the fingerprints of its models and its token set."""
        return study_hash(self.study, {**self.fingerprints, "tokens": self.token_set.fingerprint})

    def _provenance(self) -> dict[str, Any]:
        return {
            "study_hash": self.study_hash(),
            "models": {
                side: {"source": c.source, "revision": c.revision, "class": c.model_class}
                for side, c in self.checkpoints.items()
            },
            "token_set": {
                "fingerprint": self.token_set.fingerprint,
                "dataset": self.token_set.dataset,
                "bos_token_id": self.token_set.bos_token_id,
            },
            "seeds": {
                "tokens": self.study.tokens.seed,
                "saes": sorted({spec.seed for spec in self.study.sae_specs()}),
                "bootstrap": BOOTSTRAP_SEED,
            },
            "device": torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device,
        }


def _link(source: Path, target: Path) -> None:
    """Copy a directory of files that never change: as links where the file system has them."""

    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)

    with replacing(target) as directory:
        shutil.copytree(source, directory, copy_function=link)


def dataset_digests(dataset: str) -> dict[str, str]:
    """Digests of a local dataset's files, by their paths in it; none of what lies elsewhere."""
    path = Path(dataset)
    if path.is_file():
        return {path.name: sampled_digest(path)}
    return {
        file.relative_to(path).as_posix(): sampled_digest(file) for file in sorted(path.rglob("*")) if file.is_file()
    }


def fingerprint_of_tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of the files that decide how text becomes ids."""
    files = [checkpoint.directory / name for name in TOKENIZER_FILES]
    return {file.name: file_digest(file) for file in files if file.is_file()}
