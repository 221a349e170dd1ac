"""Captioners write one sentence per image: a local Transformers model or an OpenAI-compatible server.

With `source: attention` and `source: prompt` there is no captioner. The functions that clean and shorten a captioner's
answers are here too. This module does not deal with patches, prompts or tables. The captions stage decides what an
empty answer means.

Invariants:
- Decoding is greedy (temperature 0 at a server), so the same images in the same batch give the same sentences.
- Weights are safetensors, and no code from a model's repository is ever run.
- The server's key is read from the environment and sent in one header to the configured address (redirects are
  refused). It is never part of a message.
- A server is not trusted with memory or time: of one answer, headers included, at most `ANSWER_BYTES` are read, within
  `ServerCaptioner.timeout_seconds`.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import random
import re
import socket
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image

from resmaster_stages.config.dataset import CaptionsConfig, RecaptionConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError, SampleError, UserError, first_line
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.base import Ability, TokenCounter
from resmaster_stages.models.files import TRANSFORMERS, folder_with, object_in, require_weights
from resmaster_stages.models.identity import PICTUREBOOK, model_identity
from resmaster_stages.models.places import location, reason_of, resolve_device, whole_weights
from resmaster_stages.models.quiet import quiet

MAX_STYLE_TOKENS = 40
"""A longer style would leave no room for the caption."""


@dataclass(frozen=True)
class Told:
    """The settings that a captioner's messages name."""

    part: str = "captions"
    """The part of the configuration that names the captioner."""
    less: str = "lower captions.batch_size"
    """What to do if too much is asked at once."""

    @property
    def others(self) -> str:
        """What to give instead of a captioner that cannot be used."""
        sources = "server or prompt" if self.part == "captions" else "server"
        return (
            "`picturebook`, a folder or hub id of a Transformers image-text-to-text model with safetensors weights, or "
            f"{self.part}.source: {sources}"
        )


CAPTIONS = Told()


def told_of(config: RecaptionConfig) -> Told:
    """The settings that messages about the captioner of finished images name."""
    return Told("captions" if config.model is None else "recaption", "lower recaption.longest_px")


ANSWER_BYTES = 1 << 20
"""Longest answer of a server, with its headers. A sentence takes some hundred bytes."""
CAPTION_CHARACTERS = 4000
"""Of a server's sentence, without its thoughts, so much is looked at. A caption is far shorter."""


class Captioner(Protocol):
    """The interface that the captions stage uses."""

    name: str
    revision: str

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """One sentence per RGB image, not cleaned. Raises SampleError if an image is refused."""


# ---------------------------------------------------------------------------------------------- text of captions

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
_LEAD = re.compile(
    r"""^(?:
        (?:sure|certainly|of\ course|okay|here\ is|here's|caption|description|answer)\b[^:.!]{0,60}[:!]\s*
      | (?:in\ )?(?:this|the|an?)
        \ (?:image\ patch|image|picture|photo|photograph|patch|crop|scene|close-up\ image)\s*,?\s*
        (?:(?:that|which)\ )?
        (?:(?:clearly|mainly|mostly|prominently)\ )?
        (?:shows?|depicts?|displays?|features?|portrays?|presents?|captures?|contains?|showcases?|consists?\ of
           |is\ (?:of|showing|a\ (?:picture|photo|close-up)\ of)|we\ (?:can\ )?see|you\ (?:can\ )?see|there\ (?:is|are)
           |showing|depicting|of)\b\s*[:,]?\s*
      | (?:there\ (?:is|are)|(?:we|you|i)\ (?:can\ )?see)\b\s*[:,]?\s*
      | (?:a\ picture|an\ image|a\ photo|a\ photograph)\ of\b\s*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_QUOTES = "\"'`“”‘’«»*"


def clean_caption(text: str) -> str:
    """Strip a captioner's answer to a bare sentence: no control characters, line breaks, surrounding quotes or
    introductions such as "The image shows".

    Idempotent: cleaning a clean caption changes nothing.
    """
    previous = None
    text = unicodedata.normalize("NFC", text)
    while text != previous:
        previous = text
        text = _THINKING.sub(" ", text)
        text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn") or c == "\u200d")
        text = " ".join(text.split()).strip(_QUOTES + " ")
        text = _LEAD.sub("", text)
        text = unicodedata.normalize("NFC", text)
    return text if any(c.isalnum() for c in text) else ""


def shorten(text: str, count: TokenCounter, limit: int, suffix: str = "") -> tuple[str, int, bool]:
    """Drop words from the end of `text` until `text` + `suffix` fits: (shortened text, its tokens, truncated).

    The suffix is kept. A text without blanks is cut between characters. The result has at most `limit` tokens, unless
    the suffix alone has more.
    """
    whole = text + suffix
    tokens = count(whole)
    if tokens <= limit:
        return whole, tokens, False
    words = text.split(" ")
    kept, tokens = _longest(lambda n: " ".join(words[:n]), len(words), count, limit, suffix)
    if not kept:
        kept, tokens = _longest(lambda n: text[:n], len(text), count, limit, suffix)
    return (kept + suffix if kept else suffix.lstrip(" ,")), tokens, True


def style_suffix(style: str, count: TokenCounter) -> str:
    """`style` as a suffix of captions, such as ", oil painting", or "". Raises ConfigError if it is too long."""
    words = " ".join(style.split()).strip(" ,")
    if not words:
        return ""
    tokens = count(", " + words)
    if tokens > MAX_STYLE_TOKENS:
        raise ConfigError(f"captions.style has {tokens} tokens; shorten it to at most {MAX_STYLE_TOKENS}")
    return ", " + words


def _longest(prefix: Callable[[int], str], size: int, count: TokenCounter, limit: int, suffix: str) -> tuple[str, int]:
    """The longest `prefix(n)` that fits together with the suffix, and the tokens of both. ("", tokens) if none fits."""
    low, high = 0, size
    while low < high:  # counts need not rise with n, so bisection only gets near, and the loop below checks one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(prefix(middle) + suffix) <= limit else (low, middle - 1)
    for n in range(low, 0, -1):
        text = prefix(n).rstrip(" ,;:-")
        tokens = count(text + suffix)
        if text and tokens <= limit:
            return text, tokens
    return "", count(suffix.lstrip(" ,"))


def needs(config: CaptionsConfig) -> Mapping[Ability, str]:
    """What captions need of the base model's family, and the setting that needs it (`models.bases.require`)."""
    return {"attention": "captions.source: attention"} if config.source == "attention" else {}


@lru_cache(maxsize=4)
def token_counter(model: ModelConfig) -> TokenCounter:
    """A function that counts content tokens with the base model's tokenizer. No weights are loaded.

    Raises ConfigError.
    """
    return family_of(model).token_counter(model)


def content_tokens(model: ModelConfig) -> int:
    """The most content tokens of a text that the base model reads. Raises ConfigError."""
    return family_of(model).content_tokens(model)


# ---------------------------------------------------------------------------------------------------- captioners


class LocalCaptioner:
    """A Transformers image-text-to-text model: plain captioners (BLIP, GIT) and chat models (Qwen-VL, LLaVA,
    SmolVLM)."""

    told = CAPTIONS

    def __init__(self, model: Any, processor: Any, *, name: str, revision: str, instruction: str, max_new_tokens: int):
        self.model, self.processor = model, processor
        self.device = model.device  # where it runs; while the base model is there, the captioner is on the CPU
        self.name, self.revision = name, revision
        tokenizer = getattr(processor, "tokenizer", None)
        self._chat = bool(getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None))
        if self._chat and tokenizer is not None:
            tokenizer.padding_side = "left"  # a decoder continues at the right end
        self.ask(instruction, max_new_tokens)

    def ask(self, instruction: str, max_new_tokens: int) -> None:
        """Ask for this from now on."""
        self.instruction, self.max_new_tokens = instruction, max_new_tokens
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions and not self._chat:  # small captioners have few positions; the begin mark takes one
            self.max_new_tokens = min(max_new_tokens, positions - 1)

    def asked(self, instruction: str, max_new_tokens: int, told: Told) -> LocalCaptioner:
        """The same model, asked for something else. told: the settings that its messages name."""
        other = copy(self)
        other.told = told
        other.ask(instruction, max_new_tokens)
        return other

    @property
    def takes_instructions(self) -> bool:
        """Whether what it writes depends on the instruction."""
        return self._chat

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """One sentence per image, in one `generate` call."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults
        from resmaster_stages.models.occupancy import occupy

        if not images:
            return []
        inputs = self._chat_inputs(images) if self._chat else self.processor(images=list(images), return_tensors="pt")
        with busy(), torch.inference_mode(), device_faults(self.told.less):
            occupy(self.device, self.model)
            inputs = {
                key: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
                for key, value in inputs.items()
                if isinstance(value, torch.Tensor)
            }
            if getattr(self.model.config, "model_type", "") == "git":
                # GIT starts from its begin mark alone. The mask is given too: padding and end may be the same token.
                start = torch.full((len(images), 1), self.model.generation_config.bos_token_id, device=self.device)
                inputs |= {"input_ids": start, "attention_mask": torch.ones_like(start)}
            # [B, L] tokens; decoders repeat the prompt, encoder-decoders do not
            tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        if self._chat and not getattr(self.model.config, "is_encoder_decoder", False):
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _chat_inputs(self, images: Sequence[Image.Image]) -> Any:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": self.instruction}],
                }
            ]
            for image in images
        ]
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )


def server_address(base_url: str | None, part: str = "captions") -> str:
    """`base_url` of a part of the configuration. Raises ConfigError if it is missing, or no address of a server."""
    if not base_url:
        raise ConfigError(
            f"{part}.source is `server` but {part}.base_url is missing; set it, e.g. http://127.0.0.1:8000/v1"
        )
    example = "give one such as http://127.0.0.1:8000/v1"
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"{part}.base_url {base_url!r} is not an http:// or https:// address; {example}")
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:  # UnicodeError, of a label that no name of a host may have, is one too
        raise ConfigError(f"{part}.base_url {base_url!r} is no address ({first_line(error)}); {example}") from None
    if "?" in base_url or "#" in base_url:
        raise ConfigError(f"{part}.base_url {base_url!r}: leave out what follows the path, from ? or # on; {example}")
    if not host or port == 0 or not base_url.isascii() or any(each.isspace() for each in base_url):
        raise ConfigError(f"{part}.base_url {base_url!r} names no host that can be reached; {example}")
    return base_url


def server_key() -> str:
    """The key of the caption server, from the environment; "" without one. Raises ConfigError."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise ConfigError("OPENAI_API_KEY holds characters that no key has; set it again")
    return key


class ServerCaptioner:
    """An OpenAI-compatible server: `POST {base_url}/chat/completions` with the image as a data URL."""

    attempts = 5
    timeout_seconds = 120.0
    """For the connection, for sending a request, and for the whole answer."""
    longest_wait_seconds = 60.0

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        instruction: str,
        max_new_tokens: int,
        concurrency: int = 8,
        sleep: Callable[[float], None] = time.sleep,
        told: Told = CAPTIONS,
    ):
        self.url = server_address(base_url, told.part).rstrip("/") + "/chat/completions"
        self._told = told
        self.name, self.revision = model, ""
        self.instruction, self.max_new_tokens = instruction, max_new_tokens
        self.concurrency, self._sleep = concurrency, sleep
        self._jitter = random.Random()  # spreads retries of many workers; has no influence on any caption
        self._opener = urllib.request.build_opener(_NoRedirect, _BoundedHTTP, _BoundedHTTPS)

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """One sentence per image; at most `concurrency` requests at a time."""
        if not images:
            return []
        with ThreadPoolExecutor(max_workers=min(self.concurrency, len(images))) as pool:
            return list(pool.map(self._caption, images))

    def _caption(self, image: Image.Image) -> str:
        body = json.dumps(self._request(image)).encode()
        reason, wait = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self._sleep(wait)
            wait = min(self.longest_wait_seconds, 2.0**attempt) * self._jitter.uniform(0.5, 1.0)
            try:
                return self._answer(self._post(body))
            except urllib.error.HTTPError as error:
                with error:
                    self._refuse(error)  # raises unless another attempt may help
                    reason = f"HTTP {error.code}"
                    wait = max(wait, _retry_after(error, self.longest_wait_seconds))
            except (ValueError, _TooLong) as error:
                reason = f"malformed answer: {first_line(error)}"
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = first_line(getattr(error, "reason", None) or error)
        if reason.startswith(("HTTP 5", "malformed")):
            raise SampleError(
                f"caption server {self.url}: {reason}, {self.attempts} times for one image; "
                f"look at the server, and check {self._told.part}.base_url"
            )
        hint = f"{self._told.less} or raise its rate limit" if reason == "HTTP 429" else "is it running?"
        raise UserError(f"caption server {self.url} cannot be used ({reason}, {self.attempts} attempts); {hint}")

    def _request(self, image: Image.Image) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.instruction}]
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
            "seed": 0,
        }

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "resmaster-pipeline"}
        if key := server_key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self.timeout_seconds) as response:
            if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
                raise ValueError(f"it is compressed ({coding[:20]}), which was not asked for")
            data: bytes = response.read(ANSWER_BYTES)  # a read without a size would believe the length in the header
        return data

    def _answer(self, body: bytes) -> str:
        """The sentence in a response ("" if the model said nothing). Raises ValueError if it is malformed."""
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("no choices[0].message.content") from None
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None
        if isinstance(content, list):  # some servers send parts
            content = [part.get("text", "") for part in content if isinstance(part, dict)]
            content = " ".join(content) if all(isinstance(text, str) for text in content) else 0
        if content is not None and not isinstance(content, str):
            raise ValueError("content is not text")
        return _THINKING.sub(" ", content or "")[:CAPTION_CHARACTERS]

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        """Raise for an HTTP error that another attempt will not change."""
        code = error.code
        if code in (401, 403):
            raise ConfigError(f"caption server {self.url}: HTTP {code}; set OPENAI_API_KEY to a valid key")
        if code == 404:
            raise ConfigError(
                f"caption server {self.url}: HTTP 404; check {self._told.part}.base_url (it usually ends in /v1) "
                f"and that the server knows the model {self.name!r}"
            )
        if 300 <= code < 400:
            raise ConfigError(f"caption server {self.url}: it redirects (HTTP {code}); give its final address")
        if code not in (408, 409, 425, 429) and code < 500:
            detail = ""
            with suppress(OSError, http.client.HTTPException, ValueError):  # the status says enough
                detail = clean_caption(error.read(300).decode("utf-8", "replace"))
            raise SampleError(f"caption server {self.url}: refused an image (HTTP {code}): {detail}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, because following one would send the key to another host."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class _TooLong(http.client.HTTPException):
    """An answer is longer than `ANSWER_BYTES`. No ValueError, which http.client takes for a broken chunk."""


class _Bounded(io.RawIOBase):
    """What a server sends, within `ANSWER_BYTES` and the time-out of the socket for all of it."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket):
        self._raw, self._connection, self._left = raw, connection, ANSWER_BYTES
        seconds = connection.gettimeout()
        self._ends = math.inf if seconds is None else time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError if the time is over, and _TooLong if the answer is too long."""
        seconds = self._ends - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the answer does not end")
        if self._left <= 0:
            raise _TooLong(f"it is longer than {ANSWER_BYTES >> 10} KiB")
        if seconds < math.inf:
            self._connection.settimeout(seconds)
        read: int | None = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= read or 0
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedAnswer(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *arguments: Any, **options: Any):
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), connection))


class _Connection(http.client.HTTPConnection):
    response_class = _BoundedAnswer


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _BoundedAnswer


class _BoundedHTTP(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class _BoundedHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request)


def _retry_after(error: urllib.error.HTTPError, longest: float) -> float:
    """Seconds that the server asks to wait, at most `longest`. 0 if it does not say."""
    try:
        return min(longest, max(0.0, float(error.headers.get("Retry-After", "0"))))
    except ValueError:  # a date; it is rare, and our own back-off is enough
        return 0.0


# ------------------------------------------------------------------------------------------------------- loading


def check_captioner(config: CaptionsConfig, here: bool, told: Told = CAPTIONS) -> None:
    """Raise ConfigError if the captioner that `config` names cannot be used, as far as its files say. Loads nothing.

    here: whether this process would ask a server, with the key in its environment. Raises NotOnThisMachine for a model
    that is at the hub only.
    """
    if config.source == "server":
        server_address(config.base_url, told.part)
        if here:
            server_key()
    if config.source != "model":
        return
    folder = folder_with(config.model, "config.json", config.revision, "captioner")
    kind = object_in(folder / "config.json").get("model_type")
    if config.model != PICTUREBOOK:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

        if kind not in KINDS:
            raise ConfigError(
                f"{told.part}.model: {config.model} is {kind!r}, no image-text-to-text model; give {told.others}"
            )
    require_weights(config.model, folder, TRANSFORMERS)


def takes_instructions(config: CaptionsConfig) -> bool:
    """Whether an instruction changes what the captioner that `config` names writes, as far as its files say.

    Raises NotOnThisMachine for a model that is at the hub only.
    """
    if config.source == "server":
        return True
    folder = folder_with(config.model, "config.json", config.revision, "captioner")
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    files = (folder / name for name in ("processor_config.json", "tokenizer_config.json"))
    return any(bool(object_in(path).get("chat_template")) for path in files if path.is_file())


def require_instructions(name: str, styles: Collection[str], taken: bool) -> None:
    """Raise ConfigError if the captioner `name` is asked for several styles and takes no instructions.

    taken: whether it takes instructions.
    """
    if len(styles) > 1 and not taken:
        raise ConfigError(
            f"recaption.styles: the captioner {name} takes no instruction, so {' and '.join(sorted(styles))} would be "
            "the same caption; keep one style, or name a chat model in recaption.model"
        )


def load_captioner(config: CaptionsConfig, device: str = "auto", told: Told = CAPTIONS) -> Captioner | None:
    """The captioner that `config` names, or None if it names none. A local model stays loaded until another one is.

    Raises ConfigError, in one line, if a model cannot be loaded or the server's address is missing.
    """
    if config.source in ("attention", "prompt"):
        return None
    if config.source == "server":
        return ServerCaptioner(
            config.base_url,
            config.model,
            instruction=config.instruction,
            max_new_tokens=config.max_new_tokens,
            concurrency=config.batch_size,
            told=told,
        )
    place = location(config.model, "captioner")
    resolve_device(device)
    try:
        loaded = _load_local(config.model, config.revision, device)
    except Exception as error:  # loaders raise many kinds of errors; the user's remedy is the same
        raise ConfigError(
            f"{told.part}.model {config.model!r} cannot be loaded ({reason_of(error, place)}); give {told.others}"
        ) from None
    return loaded.asked(config.instruction, config.max_new_tokens, told)


@lru_cache(maxsize=1)
def _load_local(name: str, revision: str | None, device: str) -> LocalCaptioner:
    """The captioner `name`, without an instruction."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from resmaster_stages.models.occupancy import occupy

    resolved, place = resolve_device(device), location(name, "captioner")
    embedded = name == PICTUREBOOK
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": embedded}
    if revision:
        options["revision"] = revision
    processor = AutoProcessor.from_pretrained(place, **options)
    with quiet(), whole_weights(place):
        model = AutoModelForImageTextToText.from_pretrained(
            place,
            use_safetensors=True,
            # the checkpoint's own precision on GPUs; CPUs are slow or wrong in half precision
            dtype=torch.float32 if resolved.type == "cpu" else "auto",
            **options,
        )
    occupy(resolved, model.eval())
    revision = revision or getattr(model.config, "_commit_hash", None) or ""
    if embedded:
        revision = model_identity(ModelConfig()).partition("@")[2]
    return LocalCaptioner(model, processor, name=name, revision=revision, instruction="", max_new_tokens=1)
