"""Web page: tiles and token counts of images, streamed chat, comparison of two grids (extra `web`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyres_vlm.data.headers import IMAGE_SUFFIXES
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Turn
from anyres_vlm.serve.chat import ChatSession
from anyres_vlm.serve.views import STYLE, Alternatives, alternatives_view, tiles_view

MAX_IMAGES = 8  # per conversation; each may take a second and 500 MB to decode
MAX_QUEUE = 16  # waiting questions; one is answered at a time
QUESTION_LENGTH = 8000  # characters
KEPT_S = 3600  # lifetime of uploads and of idle conversations
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # no content from other hosts, also by gradio
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
Messages = list[dict[str, str]]


class WebPage:
    """Page of one model; its methods handle the page's events."""

    def __init__(self, assistant: Assistant, title: str) -> None:
        self.assistant, self.title = assistant, title

    def begin(self, files: list[str] | None) -> tuple[str, Messages, None, str]:
        """Return the images as the model sees them, and a new conversation about them."""
        return tiles_view(_references(files), self.assistant.tiling, candidates=False), *_cleared()

    def explore(self, files: list[str] | None, grid: str, dialect: Dialect, layout: Layout) -> str:
        """Return the images under any grid, dialect and layout, with all candidate canvases."""
        own = self.assistant.tiling
        tiling = Tiling.from_grid(Grid.parse(grid), tile=own.tile, patch=own.patch, layout=layout, dialect=dialect)
        return tiles_view(_references(files), tiling, candidates=True)

    def ask(
        self, question: str, files: list[str] | None, session: ChatSession | None, new_tokens: float, temperature: float
    ) -> Iterator[tuple[Messages, ChatSession, str, str]]:
        """Yield the messages so far, the session, the emptied question box and finally the alternative tokens."""
        decoding = Decoding(int(new_tokens), float(temperature))
        if session is None:
            session = _session(self.assistant, decoding, files)
        session.decoding = decoding
        messages = [_message(turn) for turn in [*session.turns, Turn("user", question)]]
        for answer, alternatives in self._answer(session, question):
            yield [*messages, _message(Turn("assistant", answer))], session, "", alternatives

    def compare(
        self, question: str, files: list[str] | None, first: str, second: str, new_tokens: float, temperature: float
    ) -> Iterator[tuple[str, str, str, str]]:
        """Yield the answer and tiles under one grid, and under another."""
        if not files:
            raise UsageError("no image to compare: drop one above")
        decoding = Decoding(int(new_tokens), float(temperature))
        assistants = [self.assistant.with_grid(Grid.parse(grid)) for grid in (first, second)]
        tiles = [tiles_view(_references(files), assistant.tiling, candidates=False) for assistant in assistants]
        answers = ["", ""]
        for place, assistant in enumerate(assistants):
            for answer, _ in self._answer(_session(assistant, decoding, files), question):
                answers[place] = answer
                yield answers[0], tiles[0], answers[1], tiles[1]

    def _answer(self, session: ChatSession, question: str) -> Iterator[tuple[str, str]]:
        """Yield the answer so far, and at its end the alternatives to its tokens."""
        if not question.strip():
            raise UsageError("the question is empty: enter one")
        alternatives, answer = Alternatives(self.assistant.tokenizer), ""
        yield answer, ""
        for piece in session.stream(question.strip()[:QUESTION_LENGTH], alternatives):
            answer += piece
            yield answer, ""
        yield answer, alternatives_view(alternatives)

    def blocks(self) -> gr.Blocks:
        """Return the gradio page."""
        with gr.Blocks(title="AnyRes", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as blocks:
            gr.Markdown(f"## AnyRes: {escape(self.title)}")
            files = gr.File(
                label="Images: drop them here",
                file_count="multiple",
                file_types=sorted(IMAGE_SUFFIXES),
                height=140,
                elem_id="files",
            )
            with gr.Tab("Chat"):
                self._chat_tab(files)
            with gr.Tab("Compare grids"):
                self._compare_tab(files)
            with gr.Tab("Tiles"):
                self._tiles_tab(files)
        return blocks

    def _chat_tab(self, files: gr.File) -> None:
        session = gr.State(None, time_to_live=KEPT_S)
        with gr.Row():
            with gr.Column(scale=1):
                tiles = gr.HTML(tiles_view([], self.assistant.tiling, candidates=False))
            with gr.Column(scale=1):
                messages = gr.Chatbot(
                    label="Conversation", height=420, buttons=[], feedback_options=None, render_markdown=False
                )
                question = gr.Textbox(label="Question", max_length=QUESTION_LENGTH, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                    begin = gr.Button("Start over", elem_id="begin")
                decoding = _decoding()
                with gr.Accordion("Alternatives to the answer's tokens", open=True):
                    alternatives = gr.HTML(elem_id="alternatives")
        asked = gr.on(
            [ask.click, question.submit],
            _with_warnings(self.ask),
            [question, files, session, *decoding],
            [messages, session, question, alternatives],
            **MODEL,
        )
        stop.click(None, cancels=[asked], queue=False)
        begun = [messages, session, alternatives]
        cleared = gr.on([begin.click, messages.clear], _cleared, None, begun, cancels=[asked])
        changed = files.change(_with_warnings(self.begin), files, [tiles, *begun], cancels=[asked])
        for event in (cleared, changed):  # again, after anything that a cancelled answer may still have sent
            event.then(_cleared, None, begun, **MODEL)

    def _compare_tab(self, files: gr.File) -> None:
        question = gr.Textbox(label="Question", max_length=QUESTION_LENGTH, elem_id="compared")
        decoding = _decoding()
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Row():
            columns = [self._compared(grid, number) for number, grid in enumerate(("1x1", "2x2"))]
        (first, *left), (second, *right) = columns
        inputs = [question, files, first, second, *decoding]
        gr.on([compare.click, question.submit], _with_warnings(self.compare), inputs, [*left, *right], **MODEL)

    def _compared(self, grid: str, number: int) -> tuple[gr.Textbox, gr.Textbox, gr.HTML]:
        with gr.Column():
            return (
                gr.Textbox(grid, label="Grid, ROWSxCOLUMNS"),
                gr.Textbox(label="Answer", lines=3, interactive=False, elem_id=f"answer{number}"),
                gr.HTML(),
            )

    def _tiles_tab(self, files: gr.File) -> None:
        own = self.assistant.tiling
        with gr.Row():
            grid = gr.Textbox("2x2", label="Grid, ROWSxCOLUMNS and Enter", elem_id="grid")
            dialect = gr.Radio(get_args(Dialect), value=own.dialect, label="Dialect", elem_id="dialect")
            layout = gr.Radio(get_args(Layout), value=own.layout, label="Layout")
        tiles = gr.HTML(elem_id="tiles")
        changes = [files.change, grid.submit, dialect.change, layout.change]
        gr.on(changes, _with_warnings(self.explore), [files, grid, dialect, layout], tiles)


def serve_page(page: WebPage, host: str, port: int, max_upload_mb: int) -> None:
    """Serve until Ctrl-C. Raises `UsageError` if the host or port is not available."""
    blocks = page.blocks().queue(default_concurrency_limit=2, max_size=MAX_QUEUE, api_open=False)
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_upload_mb}mb",
            max_threads=8,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(_OwnContentOnly)]},
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: choose another --port or --host ({error})") from None
    print(f"serving on {url} (Ctrl-C ends)", flush=True)
    blocks.block_thread()


class _OwnContentOnly:
    """Middleware that forbids the browser to load anything from other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, answer)


def _decoding() -> tuple[gr.Slider, gr.Slider]:
    with gr.Accordion("Decoding", open=False):
        return (
            gr.Slider(1, 1024, value=256, step=1, label="Maximum tokens per answer"),
            gr.Slider(0, 2, value=0, step=0.1, label="Temperature; 0 for greedy decoding"),
        )


def _cleared() -> tuple[Messages, None, str]:
    """Return an empty conversation."""
    return [], None, ""


def _session(assistant: Assistant, decoding: Decoding, files: list[str] | None) -> ChatSession:
    session = ChatSession(assistant, decoding)
    for image in _references(files):
        session.add_image(image)
    return session


def _message(turn: Turn) -> dict[str, str]:
    """Return a message for gradio's conversation, which renders HTML."""
    return {"role": turn.role, "content": escape(turn.text.replace(f"{IMAGE_TOKEN}\n", ""), quote=False)}


def _references(files: list[str] | None) -> list[ImageRef]:
    """Return references to uploads under their original names."""
    files = files or []
    if len(files) > MAX_IMAGES:
        raise UsageError(f"{len(files)} images, at most {MAX_IMAGES} are allowed: remove some")
    return [ImageRef(Path(file).name, Path(file)) for file in files]


def _with_warnings(event: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """Wrap an event handler so that its errors are shown as one-line warnings until closed."""

    @wraps(event)
    def handle(*arguments: Any) -> Iterator[Any]:
        try:
            if isgeneratorfunction(event):
                yield from event(*arguments)
            else:
                yield event(*arguments)
        except (UsageError, DataError, OSError) as error:
            gr.Warning(escape(str(error)), duration=None)  # gr.Error would hide the outputs
            yield gr.skip()

    return handle
