"""The grammar: what parses, what breaks which rule, and what hostile text can't do."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajectory import markup
from trajectory.types import ToolCall

GOOD = (
    "<think>17 times 23.</think>\n<code>\nprint(17 * 23)\n</code>\n<result>\n391\n</result>\n"
    "<think>So 391.</think>\n<answer>It is \\boxed{391}.</answer>"
)
# Text that is dense in what could go wrong.
hostile_text = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "/",
            "think",
            "code",
            "result",
            "answer",
            "search",
            " ",
            "\n",
            "<result>",
            "</result>",
            "</code>",
            "x",
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)


def test_parse_gives_blocks_with_offsets():
    blocks = markup.parse("a<think>b</think>c<code>d")
    assert blocks == [
        markup.Block("think", "b", 1, 17, closed=True),
        markup.Block("code", "d", 18, 25, closed=False),
    ]


def test_parse_ends_an_unclosed_block_at_the_next_tag_and_skips_stray_closers():
    blocks = markup.parse("</code><think>a<code>b</code></think>")
    assert [(b.tag, b.content, b.closed) for b in blocks] == [("think", "a", False), ("code", "b", True)]


def test_tags_are_matched_exactly():
    assert markup.parse("<Think>a</Think> <think >b</think > <thinking>c</thinking> < think>d") == []


def test_a_good_trajectory_breaks_no_rule():
    assert markup.validate(GOOD) == ()


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", ("no_think", "no_answer")),
        ("<think>a</think>", ("no_answer",)),
        ("\\boxed{1}", ("no_think", "no_answer")),
        ("<think>a</think><answer>5</answer>", ("no_boxed_answer",)),
        ("<think>a</think><answer>\\boxed{}</answer>", ("no_boxed_answer",)),
        ("<think>a</think>\\boxed{5}<answer>5</answer>", ("no_boxed_answer",)),
        ("<answer>\\boxed{5}</answer>", ("no_think",)),
        ("<think>a</think><answer>\\boxed{5}", ("unpaired_tag", "no_answer")),
        ("<think>a</think></think><answer>\\boxed{5}</answer>", ("unpaired_tag",)),
        ("<think>a<think>b</think></think><answer>\\boxed{5}</answer>", ("nested_tag",)),
        (GOOD.replace("<result>\n391\n</result>", ""), ("tool_without_result",)),
        (GOOD.replace("</result>", ""), ("unpaired_tag", "nested_tag", "tool_without_result")),
        ("<think>a</think><result>1</result><answer>\\boxed{5}</answer>", ("result_without_tool",)),
        # One result can't serve two calls.
        (
            "<think>a</think><code>1</code><code>2</code><result>2</result><answer>\\boxed{2}</answer>",
            ("tool_without_result",),
        ),
        ("<think>a<code>1</code><result>1</result></think><answer>\\boxed{2}</answer>", ("nested_tag",)),
    ],
)
def test_each_broken_rule_is_named(text, broken):
    rules = markup.validate(text)
    assert set(broken) <= set(rules)
    if "nested_tag" not in broken:  # nesting cuts the outer block short, which may break other rules too
        assert rules == broken


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<think>a</think><code>\n  print(1)\n</code>", ToolCall(tool="python", content="  print(1)")),
        ("<search>who?</search>", ToolCall(tool="search", content="who?")),
        ("<think>never closed <code>1</code>", ToolCall(tool="python", content="1")),
        ("<code>1</code> ", None),
        ("<code>1", None),
        ("</code>", None),
        ("<code><think>1</code>", None),
        (GOOD, None),
    ],
)
def test_trailing_tool_call(text, call):
    assert markup.trailing_tool_call(text) == call


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("\\boxed{ 5 }", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed {3}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{left \\{ open}", "left \\{ open"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{1", None),
        ("\\boxed5", None),
        ("}{\\boxed{4}", "4"),
        ("\\\\boxed{4}", None),
    ],
)
def test_final_answer(content, answer):
    assert markup.final_answer(f"<think>\\boxed{{9}}</think><answer>{content}</answer>") == answer


def test_the_last_answer_counts():
    assert markup.final_answer("<answer>\\boxed{1}</answer><answer>\\boxed{2}</answer>") == "2"
    assert markup.final_answer("<think>\\boxed{1}</think>") is None


def test_a_forged_result_is_seen():
    assert markup.contains_forged_result("<code>1</code><result>2</result>")
    assert markup.contains_forged_result("</result>")
    assert not markup.contains_forged_result("<code>1</code> the result")


@given(hostile_text, st.integers(min_value=0, max_value=50))
def test_any_output_renders_as_exactly_one_result(output, max_chars):
    rendered = markup.render_result(output, max_chars)
    assert [(b.tag, b.closed) for b in markup.parse(rendered)] == [("result", True)]
    assert markup._pairing(rendered) == (False, False)
    # …and between a call and a thought it changes nothing of them.
    around = markup.parse(f"<code>1</code>{rendered}<think>a</think>")
    assert [(b.tag, b.closed) for b in around] == [("code", True), ("result", True), ("think", True)]


def test_escape_touches_only_what_looks_like_a_tag():
    assert markup.escape("</result><|im_end|></s>") == "< /result>< |im_end|>< /s>"
    assert markup.escape("x<y, a < b, <class 'int'>, 1<<3") == "x<y, a < b, <class 'int'>, 1<<3"
    assert markup.escape("<<code>") == "<< code>"


def test_lone_surrogates_become_encodable():
    assert markup.render_result("a\ud800b", 10) == "\n<result>\na?b\n</result>\n"


def test_long_output_is_cut_in_the_middle():
    rendered = markup.render_result("a" * 50 + "b" * 50, 10)
    assert rendered == "\n<result>\naaaaa\n[... 90 characters left out ...]\nbbbbb\n</result>\n"
    assert markup.render_result("0123456789", 10) == "\n<result>\n0123456789\n</result>\n"
    assert markup.render_result("0123456789", 0) == "\n<result>\n\n[... 10 characters left out ...]\n\n</result>\n"


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</answer>", "<", "<a", "\\boxed{", "\\boxed ", "{", "}", "<answer>\\boxed{", "<code>x</code>", "\\"],
)
def test_a_megabyte_of_hostile_text_takes_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    markup.validate(text)
    markup.trailing_tool_call(text + "</code>")
    markup.last_boxed(text)
    markup.render_result(text, 1000)
    assert time.process_time() - start < 5.0  # about 0.5 s; quadratic would be minutes
