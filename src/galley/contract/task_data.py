"""The task's data: which rows, how they are read, and what of them is trained on. Part of the contract."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from galley.contract.part import Fraction, Part, Positive

RowFormat = Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Learn = Literal["assistant", "last", "all"] | Annotated[list[Role], Field(min_length=1)]
RewrittenTurns = Literal["mask", "split"]
Thinking = Literal["keep", "drop", "mask"]
RefusedRows = Literal["refuse", "merge", "drop"]


class Columns(Part):
    """What a file calls the columns of a format, where it calls them otherwise: ``prompt: question_text``."""

    messages: str | None = None
    """Of ``chat``; so is ``tools``."""
    conversations: str | None = None
    """Of ``sharegpt``."""
    instruction: str | None = None
    """Of ``alpaca``; so are ``input``, ``output`` and ``history``."""
    input: str | None = None
    """What the instruction is about."""
    output: str | None = None
    """The answer to the instruction."""
    history: str | None = None
    """Earlier questions and answers."""
    prompt: str | None = None
    """Of ``prompt_completion``: the question."""
    completion: str | None = None
    """The answer to the prompt."""
    text: str | None = None
    """Of ``text``."""
    system: str | None = None
    """A system prompt, beside any of these but ``messages`` and ``text``."""
    tools: str | None = None
    """The tools that the assistant could call."""

    def names(self) -> dict[str, str]:
        """The file's name by the format's, of those that are set."""
        return self.model_dump(exclude_none=True)


Gate = Literal["warn", "drop", "refuse", "allow"]


class Gates(Part):
    """What becomes of doubtful rows: ``warn`` counts them and trains on them, ``drop`` leaves them out and counts them,
    ``refuse`` ends the preparation with the first one's place, ``allow`` trains on them without a word."""

    unreadable: Literal["refuse", "drop"] = "refuse"
    """A row that cannot be read: a line that is not JSON or not UTF-8, half a character, a column of another type."""
    special_tokens: Gate = "warn"
    """Special tokens of the tokenizer that are written out in a text, such as ``<|im_end|>``: the model reads them as
    what they do, not as text."""
    empty_answers: Gate = "warn"
    """Answers that hold nothing: the model is trained to end its turn at once."""
    null_characters: Gate = "warn"
    """NUL characters in a text."""
    dropped: Annotated[float, Field(ge=0, le=1)] | None = None
    """Refuse where a larger share of a source's rows is dropped, for whatever reason. null: above 1 % a warning."""


class DataSource(Part):
    """One of several files or data sets that are trained on together; what it does not set is as ``data`` has it."""

    path: str
    """As ``data.path``."""
    revision: str | None = None
    """Hub branch, tag or commit; only for hub ids."""
    subset: str | None = None
    """Which of a hub data set's configurations."""
    split: str | None = None
    """As ``data.split``."""
    format: RowFormat | None = None
    """As ``data.format``."""
    columns: Columns | None = None
    """The file's names for columns."""
    system: str | None = None
    """System prompt of conversations that have none."""
    learn: Learn | None = None
    """As ``data.learn``."""
    rewritten_turns: RewrittenTurns | None = None
    """As ``data.rewritten_turns``."""
    refused_rows: RefusedRows | None = None
    """As ``data.refused_rows``."""
    thinking: Thinking | None = None
    """As ``data.thinking``."""
    limit: Positive | None = None
    """Most rows to train on, drawn by the seed."""
    repeats: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch has each of its rows; 0.5: half of them, 2.5: each twice, and half of them a third time."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of an epoch's rows, in proportion to the others' weights. Nothing is repeated for it: the source that
    runs out first sets the epoch's length, and of the others fewer rows are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _by_its_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    def column_names(self) -> dict[str, str]:
        """The file's name of each column by the format's, of those that are set."""
        return self.columns.names() if self.columns else {}


class Data(Part):
    """What to train on: rows of conversations, or of plain text."""

    path: str | None = None
    """A file of JSON lines, JSON, CSV, Parquet or Arrow, a folder or a pattern (``data/*.jsonl``) of them, or a hub
    data set id; as the user wrote it. Either this or ``sources``."""
    sources: list[DataSource] = Field(default_factory=list)
    """Several files or data sets, as ``[{path: a.jsonl, weight: 3}, {path: org/b, weight: 1}]``; a source may also have
    ``limit``, ``repeats``, and its own ``format``, ``columns``, ``system``, ``learn``, ``split``."""
    revision: str | None = None
    """Hub branch, tag or commit; only for hub ids."""
    subset: str | None = None
    """Which of a hub data set's configurations, where it has several: its ``name`` in ``datasets.load_dataset``."""
    split: str = "train"
    """Which split of a hub data set (``train``, ``train[:5%]``, ``train+validation``), or of a folder in which the
    names of files tell of several; not used for files."""
    held_out: Fraction = 0.0
    """Share of rows kept out of training to measure the held-out loss, chosen by the seed. 0: none."""
    held_out_path: str | None = None
    """A file to measure the held-out loss on, instead of a share of ``path``."""
    max_length: Positive = 2048
    """Longest sample in tokens; a packed sample holds whole documents up to this length."""
    packing: bool = True
    """Fill each sample with several documents, none of which attends to another."""
    overlong: Literal["drop", "truncate", "truncate_left", "split", "refuse"] = "drop"
    """What to do with a row of more than ``max_length`` tokens; it is counted and reported. ``truncate`` keeps its
    beginning, ``truncate_left`` its end, ``refuse`` ends the preparation. ``split`` cuts plain text into several, and
    is its default."""
    format: RowFormat = "auto"
    """How rows are written. ``chat``: ``messages`` of ``role`` and ``content``; ``sharegpt``: ``conversations`` of
    ``from`` and ``value``; ``alpaca``: ``instruction``, ``input`` and ``output``; ``prompt_completion``: a prompt (or
    question) and a completion (or answer); ``auto``: whichever of these the columns show. All are trained on the
    assistant's tokens. ``text``: plain text, trained on every token, with no chat template and an end-of-sequence token
    after each row (continued pretraining)."""
    learn: Learn = "assistant"
    """Which messages of a conversation are trained on: the assistant's, only its last, or every token of all; or a
    list of roles (``[assistant, tool]``): what messages of these roles say, each through its end-of-turn token."""
    rewritten_turns: RewrittenTurns = "mask"
    """Answers that the chat template writes otherwise once the conversation goes on (Qwen3 takes the thinking out of
    earlier ones): ``mask`` does not train on them, and counts them; ``split`` trains on each in a document of its own,
    which ends with it, as the model is asked."""
    refused_rows: RefusedRows = "refuse"
    """Conversations that the chat template refuses, such as those with a system message or with two messages of one
    role in a row: ``refuse`` ends the preparation, ``drop`` leaves them out, ``merge`` moves the system message into
    the user's next one and joins messages, where that helps. What is changed or left out is counted."""
    thinking: Thinking = "keep"
    """What becomes of an answer's thinking (``reasoning_content``, ``reasoning`` or ``thinking`` of a message, or
    ``<think>…</think>`` before its text): ``keep`` trains on it as on the answer, as far as the template writes it;
    ``drop`` takes it out of the rows; ``mask`` leaves it in the text and trains on what follows it only."""
    columns: Columns = Field(default_factory=lambda: Columns())
    """The file's names for columns that a format calls otherwise."""
    system: str | None = None
    """System prompt of conversations that have none."""
    gates: Gates = Field(default_factory=lambda: Gates())
    """What becomes of doubtful rows."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_split(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("format") == "text":
            return {"overlong": "split"} | given
        return given

    @model_validator(mode="after")
    def _from_somewhere(self) -> Self:
        if (self.path is None) == (not self.sources):
            both = "path and sources are two answers to one question; keep one of them"
            raise ValueError(both if self.sources else "nothing to train on; set data.path, or data.sources")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("some sources have a weight and some have none; give every one a weight, or none")
        if self.sources and (self.revision or self.subset):
            raise ValueError("revision and subset belong to one data set; set them in that source")
        return self

    def listed(self) -> list[DataSource]:
        """What is trained on, each source with all of its settings; a single ``path`` is the only one."""
        if self.path is not None:
            only = {"path": self.path, "revision": self.revision, "subset": self.subset}
            return [DataSource.model_construct(**(self._shared() | only))]
        given = [{name: value for name, value in source if value is not None} for source in self.sources]
        return [DataSource.model_construct(**(self._shared() | source)) for source in given]

    def held_out_settings(self) -> DataSource:
        """How rows of ``held_out_path`` are read. Of a folder with several splits it is not the one trained on."""
        return DataSource.model_construct(
            **(self._shared() | {"path": self.held_out_path or "", "split": "validation"})
        )

    def _shared(self) -> dict[str, Any]:
        names = ("split", "format", "columns", "system", "learn", "rewritten_turns", "refused_rows", "thinking")
        return {name: getattr(self, name) for name in names}
