"""The tables, with every rule that a database can hold: keys, checks, one open refit per run.

No statement stands here. Changing a table needs a migration; a test compares the two.
"""

from __future__ import annotations

from datetime import datetime, timezone

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.exc import DontWrapMixin

from evenodds_service.errors import StoreError


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept in UTC on every database. A naive one, which nobody can read, is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.utcoffset() is None:
            raise NaiveDatetime(f"datetime {value.isoformat()} has no time zone: pass one in UTC")
        in_utc = value.astimezone(timezone.utc)
        # SQLite keeps no offset.
        return in_utc.replace(tzinfo=None) if dialect.name == "sqlite" else in_utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _run_id() -> Column[int]:
    return Column("run_id", Integer, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("settings", Text, nullable=False),  # JSON of RunSettings; its embedder is resolved by the first prompt
    Column("embedding_width", Integer),
    Column("n_prompts", Integer, nullable=False, server_default="0"),
    Column("log_position", BigInteger, nullable=False, server_default="0"),
    Column("head_step", BigInteger),
    Column("n_observations", BigInteger, nullable=False, server_default="0"),
    Column("model_version", Integer, nullable=False, server_default="0"),
    Column("void_position", BigInteger, nullable=False, server_default="0"),  # of the newest rewind or retract
    Column("fork_of", Text),  # name of the run that it started from
    Column("fork_step", BigInteger),
    Column("rate_names", Text),  # JSON: all names among the pool's prior_rates
    Column("n_retired", Integer, nullable=False, server_default="0"),  # of the n_prompts that have come
    Column("retired_position", BigInteger, nullable=False, server_default="0"),  # of the newest retire entry
    Column("base_position", BigInteger, nullable=False, server_default="0"),  # of the checkpoint below which no log is
    Column("base_step", BigInteger),  # the highest step up to there
    Column("base_observations", BigInteger, nullable=False, server_default="0"),  # that count up to there
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("embedding_width > 0", name="embedding_width"),
    CheckConstraint(
        "n_prompts >= 0 AND log_position >= 0 AND n_observations >= 0 AND model_version >= 0", name="counts"
    ),
    CheckConstraint("void_position >= 0 AND void_position <= log_position", name="void_position"),
    CheckConstraint("fork_step IS NULL OR (fork_step >= 0 AND fork_of IS NOT NULL)", name="fork_step"),
    CheckConstraint("head_step >= 0", name="head_step"),
    sqlite_autoincrement=True,  # the id of a deleted run never names another one
)

prompts = Table(
    "prompts",
    metadata,
    _run_id(),
    Column("index", Integer, nullable=False),  # from 0 without gaps, in order of arrival
    Column("prompt_id", Text, nullable=False),
    Column("text", Text),
    Column("text_key", Text),
    Column("join_key", Text),  # by which runs know the same prompt, also where no texts are kept
    Column("group", Text),
    Column("features", Text),  # JSON: name -> number
    Column("prior_rate", Double),
    Column("prior_rates", Text),  # JSON: name -> rate, or [successes, attempts]
    Column("vector_key", Text),
    Column("answer", Text),  # JSON; a run that keeps no texts keeps no answers
    Column("answer_features", Text),  # JSON: a list of numbers
    Column("retired_at", BigInteger),  # position of the log entry that retired it
    PrimaryKeyConstraint("run_id", "index"),
    CheckConstraint('"index" >= 0', name="index"),
    CheckConstraint("prior_rate >= 0 AND prior_rate <= 1", name="prior_rate"),
    CheckConstraint("text IS NULL OR text_key IS NOT NULL", name="text_key"),  # a run may keep no texts
)

Index(
    "uq_prompts_prompt_id",
    prompts.c.run_id,
    prompts.c.prompt_id,
    unique=True,
    sqlite_where=text("retired_at IS NULL"),
    postgresql_where=text("retired_at IS NULL"),
)
Index(
    "ix_prompts_retired_at",
    prompts.c.run_id,
    prompts.c.retired_at,
    sqlite_where=text("retired_at IS NOT NULL"),
    postgresql_where=text("retired_at IS NOT NULL"),
)
Index("ix_prompts_text_key", prompts.c.text_key)

pool_blocks = Table(
    "pool_blocks",
    metadata,
    _run_id(),
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),  # of prompts first <= index < last
    Column("features", Text, nullable=False),  # the names of what is packed: a run has blocks of one name
    Column("content", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run_id", "first"),
    CheckConstraint("first >= 0 AND last > first", name="range"),
)

embeddings = Table(
    "embeddings",
    metadata,
    Column("embedder", Text, nullable=False),  # `caller:<run id>` for vectors that callers sent
    Column("key", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("vector", LargeBinary, nullable=False),  # little-endian 16-bit floats
    PrimaryKeyConstraint("embedder", "key"),
    CheckConstraint("width >= 1 AND length(vector) = 2 * width", name="width"),
)

log = Table(
    "log",
    metadata,
    _run_id(),
    Column("position", BigInteger, nullable=False),  # from 1 without gaps, in order of commit
    Column("kind", Text, nullable=False),
    Column("step", BigInteger),
    Column("request_id", Text),
    Column("request_hash", Text),
    Column("selection_id", Text),
    Column("n_observations", Integer, nullable=False, server_default="0"),  # those that count
    Column("voided_at", BigInteger),  # position of the entry that voided this one
    Column("voided_rows", Text),  # JSON: which observations were voided alone; see entries.py
    Column("body", Text, nullable=False),  # JSON; see entries.py
    Column("created_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("run_id", "position"),
    CheckConstraint("position >= 1", name="position"),
    CheckConstraint("kind IN ('pool', 'observe', 'select', 'snapshot', 'retire', 'rewind', 'retract')", name="kind"),
    CheckConstraint("(step IS NOT NULL AND step >= 0) = (kind IN ('observe', 'select'))", name="step"),
    CheckConstraint("(request_id IS NULL) = (request_hash IS NULL)", name="request"),
    CheckConstraint("n_observations >= 0 AND (n_observations = 0 OR kind = 'observe')", name="n_observations"),
    CheckConstraint(
        "voided_at IS NULL OR (voided_at > position AND kind IN ('observe', 'select', 'snapshot'))", name="voided_at"
    ),
)
# A request id is taken by what counts: a voided report may be sent again under its id.
Index(
    "uq_log_request_id",
    log.c.run_id,
    log.c.request_id,
    unique=True,
    sqlite_where=text("request_id IS NOT NULL AND voided_at IS NULL"),
    postgresql_where=text("request_id IS NOT NULL AND voided_at IS NULL"),
)

selections = Table(
    "selections",
    metadata,
    Column("selection_id", Text, nullable=False),
    _run_id(),
    Column("step", BigInteger, nullable=False),
    Column("arguments_hash", Text, nullable=False),
    Column("reply", Text, nullable=False),
    Column("log_position", BigInteger, nullable=False),
    Column("voided_at", BigInteger),  # log position of the rewind that voided it
    PrimaryKeyConstraint("run_id", "selection_id"),
    CheckConstraint("voided_at > log_position", name="voided_at"),
)
Index(
    "uq_selections_step",
    selections.c.run_id,
    selections.c.step,
    unique=True,
    sqlite_where=text("voided_at IS NULL"),
    postgresql_where=text("voided_at IS NULL"),
)

refits = Table(
    "refits",
    metadata,
    Column("id", Integer, primary_key=True),
    _run_id(),
    Column("status", Text, nullable=False),
    Column("worker", Text),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("requested_at", UtcDateTime, nullable=False),
    Column("lease_until", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("model_version", Integer),
    Column("report", Text),  # JSON
    Column("error", Text),
    CheckConstraint("status IN ('pending', 'running', 'done', 'failed')", name="status"),
    CheckConstraint(
        "status <> 'running' OR (worker IS NOT NULL AND lease_until IS NOT NULL AND attempts >= 1)",
        name="running",
    ),
    CheckConstraint("(finished_at IS NOT NULL) = (status IN ('done', 'failed'))", name="finished"),
    CheckConstraint("(model_version IS NOT NULL) = (status = 'done')", name="done"),
    sqlite_autoincrement=True,  # a refit's id fences what its worker publishes
)
Index("ix_refits_run_id", refits.c.run_id)
Index(
    "uq_refits_open",
    refits.c.run_id,
    unique=True,
    sqlite_where=text("status IN ('pending', 'running')"),
    postgresql_where=text("status IN ('pending', 'running')"),
)

snapshots = Table(
    "snapshots",
    metadata,
    _run_id(),
    Column("version", Integer, nullable=False),
    Column("embedder", Text, nullable=False),
    Column("weights", LargeBinary, nullable=False),  # empty where it was dropped
    Column("fitted_position", BigInteger, nullable=False),
    Column("log_position", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("run_id", "version"),
    CheckConstraint("version >= 1", name="version"),
    CheckConstraint("fitted_position >= 0 AND fitted_position < log_position", name="positions"),
)

decisions = Table(
    "decisions",
    metadata,
    Column("decision_id", Text, primary_key=True),
    _run_id(),
    Column("step", BigInteger, nullable=False),
    Column("prompt", Text, nullable=False),  # JSON of what an observation says of its prompt
    Column("created_at", UtcDateTime, nullable=False),
    Column("prompt_id", Text, nullable=True),  # that of a new text too; missing where an older release wrote the row
    Column("text_key", Text, nullable=True),
    CheckConstraint("step >= 0", name="step"),
)
Index("ix_decisions_created_at", decisions.c.created_at)
Index("ix_decisions_run_id", decisions.c.run_id)

api_keys = Table(
    "api_keys",
    metadata,
    Column("name", Text, nullable=False),
    Column("secret_hash", Text, nullable=False, unique=True),  # SHA-256, hexadecimal
    Column("second_hash", Text, unique=True),  # of the secret before it, which works on until its rotation is finished
    Column("scopes", Text, nullable=False),  # joined by blanks
    Column("runs", Text, nullable=False),
    Column("requests_per_minute", Integer),
    Column("max_body_bytes", BigInteger),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    PrimaryKeyConstraint("name"),
    CheckConstraint("length(secret_hash) = 64", name="secret_hash"),
    CheckConstraint("requests_per_minute >= 1 AND max_body_bytes >= 1", name="limits"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _run_id(),
    Column("position", BigInteger, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("run_id", "position"),
    CheckConstraint("position >= 0", name="position"),
)


bases = Table(
    "bases",
    metadata,
    _run_id(),
    Column("history", LargeBinary, nullable=False),  # observations up to the base, of prompts that were left then
    PrimaryKeyConstraint("run_id"),
)

run_states = Table(
    "run_states",
    metadata,
    Column("run_id", Integer, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("log_position", BigInteger, nullable=False),  # of the log as far as the state knows it
    Column("verdict", Text, nullable=False),
    Column("head_step", BigInteger),
    Column("n_alarms", Integer, nullable=False),
    Column("alarm_codes", Text, nullable=False),  # each between blanks, so that LIKE '% code %' finds it
    Column("alarms", Text, nullable=False),  # JSON; see run_states.py
    Column("notes", Text, nullable=False),  # JSON
    Column("lift", Double),
    Column("lift_low", Double),
    Column("lift_high", Double),
    Column("rollouts_saved", Double),
    Column("rollouts_saved_low", Double),
    Column("rollouts_saved_high", Double),
    Column("informative_share", Double),  # of the newest window
    Column("informative_shares", Text, nullable=False),  # JSON: [first step, last step, share] of each window
    Column("figures", Text, nullable=False),  # JSON: name -> number
    Column("active_at", UtcDateTime),  # when the newest batch or outcomes came
    Column("began_at", UtcDateTime),  # when the first batch that stands was chosen, where rollouts are saved
    Column("saved_at", UtcDateTime, nullable=False),
    CheckConstraint("log_position >= 0 AND n_alarms >= 0", name="counts"),
    CheckConstraint("verdict IN ('broken', 'not_helping', 'helping', 'learning', 'no_data')", name="verdict"),
)


class NaiveDatetime(StoreError, DontWrapMixin):
    """`DontWrapMixin` keeps SQLAlchemy from hiding it in a StatementError."""

    code = "naive_datetime"
