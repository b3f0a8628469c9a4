"""A gateway from the configuration: which collaborators there are, and who is given whom."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from fastapi import FastAPI

from serve.assigner import Assigner
from serve.catalog import Catalog
from serve.config import Settings
from serve.engine_client import EngineClient
from serve.experimentation import Experimentation
from serve.experiments.recorder import Recorder
from serve.follower import Follower
from serve.gateway.app import create_app
from serve.gateway.fetching import ImageFetcher
from serve.gateway.generation import Services
from serve.gateway.receiving import BodyLimits
from serve.gateway.shadowing import Shadows
from serve.identity import KeyRing
from serve.limits import KeyLimits
from serve.logs import configure
from serve.merging import Merging
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiments import Experiments
from serve.registry.garbage import Garbage
from serve.registry.keys import Keys
from serve.registry.merges import Merges
from serve.registry.replies import Replies
from serve.registry.repository import Repository
from serve.registry.trials import Trials
from serve.storage import store_of
from serve.telemetry import Metrics
from serve.tracing import Tracing
from serve.watch import Watch


def gateway_app(settings: Settings, engines: EngineClient, ensure_runner: Callable[[], None]) -> FastAPI:
    """The ASGI application behind Ray Serve's proxy. Connects to the registry. ``ensure_runner``: has the owner of
    merge tasks up."""
    configure(settings.telemetry.log_level)
    database = Database(settings.registry_url)
    repository = Repository(database)
    store = store_of(settings)
    follower = Follower(repository.revision, snapshot=database.reading, max_age_s=settings.registry.max_age_s)
    keys = KeyRing(Keys(database).all, is_required=settings.auth.required, check_fresh=follower.check_fresh)
    follower.add(keys.reload)
    catalog = Catalog(repository, engines, store, follower, base_name=settings.base.name)
    metrics = Metrics(settings.telemetry.adapter_labels)
    experiments, trials = Experiments(database), Trials(database)
    assigner = Assigner(
        experiments,
        catalog,
        follower,
        base_name=settings.base.name,
        unit_secret=settings.experiments.unit_secret.get_secret_value(),
    )
    recorder = Recorder(trials.add, metrics.lost)
    experimentation = Experimentation(
        experiments,
        trials,
        EvidenceReader(database),
        repository,
        catalog,
        assigner,
        engines,
        follower,
        recorder,
        settings.experiments,
        base_name=settings.base.name,
    )
    garbage = Garbage(database, store, timedelta(seconds=settings.store.grace_s))
    merging = Merging(
        Merges(database),
        catalog,
        engines,
        garbage,
        ensure_runner,
        base_name=settings.base.name,
        roots=settings.merges.roots,
    )
    services = Services(
        catalog=catalog,
        engines=engines,
        metrics=metrics,
        store=store,
        assigner=assigner,
        experiments=experimentation,
        recorder=recorder,
        shadows=Shadows(engines, recorder, metrics, at_once=settings.experiments.shadows_at_once),
        replies=Replies(database),
        images=ImageFetcher(settings.images),
        garbage=garbage,
        merging=merging,
        base_name=settings.base.name,
        timeout_s=settings.server.request_timeout_s,
        isolates_caches=settings.auth.isolate_caches,
    )
    return create_app(
        services,
        follower,
        keys,
        KeyLimits(settings.auth.rates.get_secret_value()),
        Tracing(settings.telemetry, "gateway"),
        Watch(assigner, experimentation, every_s=settings.experiments.look_every_s),
        max_header_bytes=settings.server.max_header_bytes,
        bodies=BodyLimits(
            max_bytes=settings.server.max_body_bytes,
            max_upload_bytes=settings.adapters.max_bytes,
            timeout_s=settings.server.body_timeout_s,
            bytes_per_s=settings.server.body_bytes_per_s,
            max_arriving=max(1, settings.gateways.max_ongoing_requests // 2),
            max_held_bytes=max(settings.server.max_bodies_bytes, settings.server.max_body_bytes),
        ),
        collect_every_s=settings.store.collect_every_s,
        preload=settings.adapters.preload,
        behind_proxy=True,
    )
