"""From a request's tokens to chunks of text: whole characters, thoughts apart from the answer, stop strings.

Tags are in neither part, and nor are the newlines that templates write around them: those right after an opening tag,
right before a closing one and right after it. A stop string is therefore looked for in the answer as a person sees it.
"""

from fathom.data.tokenizer import Tokenizer
from fathom.engine.matching import Search
from fathom.engine.protocol import Chunk, Fault, FinishReason, Part, Request, TokenLogprob, Usage
from fathom.engine.thinking import CLOSING, OPENING, Tag, ThinkTags, ThoughtTracker
from fathom.errors import UserError


class OutputStream:
    """One request's output, token by token."""

    def __init__(self, tokenizer: Tokenizer, request: Request, tags: ThinkTags | None, *, cached: int = 0) -> None:
        """`tags` are the model's, or None; `cached` of the prompt's tokens came from the prefix cache.

        Raises `UserError` for an empty stop string, and for bounds on thoughts without tags or against each other.
        """
        if "" in request.stop:
            raise UserError("stop: an empty string would end every answer at once; remove it")
        if tags is None and (request.thinking is not None or request.starts_thinking):
            raise UserError("thinking: this model has no think tags; leave the bounds on thoughts out")
        self.cached = cached
        self.completion = 0
        """Tokens so far."""
        self.finish_reason: FinishReason | None = None
        """Set once the last chunk is out; then nothing may be pushed any more."""
        self.thoughts = tags and ThoughtTracker(tags, request.thinking, inside=request.starts_thinking)
        """Where in its thoughts the output is, and which tokens are forced; None for a model without tags."""
        self._tags = tags
        self._request = request
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._decoder = tokenizer.stream()
        self._tag_search = Search((OPENING, CLOSING)) if tags and not tags.tokens else None
        self._stop_search = Search(request.stop) if request.stop else None
        self._stopped = False
        self._part: Part = "thinking" if request.starts_thinking else "answer"
        self._trims = request.starts_thinking  # whether newlines that come next belong to a tag
        self._newlines = ""  # at the end of thoughts: a tag's, if one comes
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.logprobs is None else []
        self._chunks: list[Chunk] = []

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Chunk]:
        """Take the next token, drawn or forced. Gives the chunks that it completes, often none."""
        assert self.finish_reason is None, f"{self.finish_reason=}"
        self.completion += 1
        self._tokens.append(token)
        if self._logprobs is not None:
            assert logprob is not None
            self._logprobs.append(logprob)
        if self.thoughts is not None:
            self.thoughts.advance(token)
        if token not in self._ends:
            self._read(token)
        if self._stopped or (token in self._ends and not self._request.ignore_eos):
            return self.end("stop")
        if self.completion >= self._request.max_tokens:
            return self.end("length")
        if self._text:
            self._emit()
        return self._take()

    def end(self, reason: FinishReason, message: str = "", fault: Fault = "engine") -> list[Chunk]:
        """End the output now. What was held back is shown, unless a stop string came before.

        `length` becomes `stop` where the text held back has a whole stop string.
        """
        assert self.finish_reason is None, f"{self.finish_reason=}"
        self._flush()
        self.finish_reason = "stop" if self._stopped and reason == "length" else reason
        self._emit(message, fault)
        return self._take()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        reasoning = 0 if self.thoughts is None else self.thoughts.reasoning
        return Usage(len(self._request.prompt_ids), self.cached, self.completion, reasoning)

    def _read(self, token: int) -> None:
        tag = self._tags.tokens.get(token) if self._tags else None
        if tag is None:
            self._find_tags(self._decoder.push(token))
        else:
            self._say(self._decoder.flush())
            self._turn(tag)

    def _find_tags(self, text: str) -> None:
        """Text that may spell tags, if that is how the model writes them."""
        if self._tag_search is None:
            return self._say(text)
        while text:
            before, tag, text = self._tag_search.push(text)
            self._say(before)
            if tag is not None:
                self._turn("opening" if tag == OPENING else "closing")
        return None

    def _turn(self, tag: Tag) -> None:
        """A tag: the other part begins, unless it is already there."""
        if tag == "closing" and self._part == "thinking":
            self._newlines = ""
            self._switch("answer")
        elif tag == "opening" and self._part == "answer":
            self._flush_stop_search()
            if not self._stopped:
                self._switch("thinking")

    def _switch(self, part: Part) -> None:
        """Hand out what belongs to the part that ends. A tag's tokens go with the thoughts."""
        assert self.thoughts is not None
        later = min(self.thoughts.tag_tokens, len(self._tokens)) if part == "thinking" else 0
        if self._text or len(self._tokens) > later:
            self._emit(keep=later)
        self._part, self._trims = part, True

    def _say(self, text: str) -> None:
        """Text of the present part, without tags."""
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        if self._part == "thinking":
            text = self._newlines + text
            kept = text.rstrip("\n")
            self._newlines = text[len(kept) :]
            self._text += kept
        else:
            self._answer(text)

    def _answer(self, text: str) -> None:
        if self._stopped:
            return
        if self._stop_search is not None:
            text, stop, _ = self._stop_search.push(text)
            self._stopped = stop is not None
        self._text += text

    def _flush_stop_search(self) -> None:
        if self._stop_search is not None and not self._stopped:
            text, stop, _ = self._stop_search.flush()
            self._text += text
            self._stopped = stop is not None

    def _flush(self) -> None:
        """Nothing more comes: a character stays incomplete, and what looked like the start of a tag is none."""
        self._find_tags(self._decoder.flush())
        if self._tag_search is not None:
            self._say(self._tag_search.flush()[0])
        if self._part == "thinking":
            self._text += self._newlines
            self._newlines = ""
        self._flush_stop_search()

    def _emit(self, message: str = "", fault: Fault = "engine", *, keep: int = 0) -> None:
        """Put a chunk out, with all tokens but the last `keep`."""
        count = len(self._tokens) - keep
        logprobs = None
        if self._logprobs is not None:
            logprobs, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        text, self._text = self._text, ""
        self._chunks.append(Chunk(self._part, text, tokens, logprobs, self.usage, self.finish_reason, message, fault))

    def _take(self) -> list[Chunk]:
        chunks, self._chunks = self._chunks, []
        return chunks
