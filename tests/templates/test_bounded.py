"""Hostile templates: killed at a limit, and the next template is rendered as if nothing had happened."""

import os
import time
from pathlib import Path

import jinja2
import pytest

from rlhfctl.templates.bounded import Sandbox
from rlhfctl.templates.inspect import inspect
from rlhfctl.templates.render import LimitError
from rlhfctl.templates.sides import load_side

HOSTILE = {
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}",
    "slow filters": "{% for i in range(999) %}{% set x = ('ab' * 10000000) | replace('a', 'c') %}{% endfor %}",
    "doubling": "{% set n = namespace(a='aaaaaaaaaa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "padding": "{{ 'a' | center(99999999999) }}",
    "format": "{{ '%0999999999d' % 1 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_limits(name: str) -> None:
    sandbox = Sandbox()
    try:
        started = time.monotonic()
        with pytest.raises(LimitError):
            sandbox.render(HOSTILE[name], [], {})
        with pytest.raises(LimitError):  # not tried again
            sandbox.render(HOSTILE[name], [], {})
        assert sandbox.render("{{ 1 + 1 }}", [], {}) == "2"
        assert time.monotonic() - started < 30
    finally:
        sandbox.close()


def test_no_code_and_no_files(tmp_path: Path) -> None:
    sandbox = Sandbox()
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch x') }}",
        "{% include '/etc/passwd' %}",
    ):
        with pytest.raises(jinja2.TemplateError):
            sandbox.render(source, [], {})
    assert sandbox.render("{{ self._TemplateReference__context }}{{ messages.__class__ }}", [], {}) == ""
    sandbox.close()


def test_errors_keep_their_class_and_message() -> None:
    sandbox = Sandbox()
    with pytest.raises(jinja2.TemplateSyntaxError) as caught:
        sandbox.render("a\n{% for", [], {})
    assert caught.value.lineno == 2
    with pytest.raises(jinja2.UndefinedError, match="'a' is undefined"):
        sandbox.render("{{ a.b }}", [], {})
    with pytest.raises(jinja2.TemplateError, match=r"^roles must alternate$"):
        sandbox.render("{{ raise_exception('roles must alternate') }}", [], {})
    sandbox.close()


def test_the_child_goes_with_its_sandbox() -> None:
    sandbox = Sandbox()
    sandbox.render("x", [], {})
    pid = sandbox._child[0]
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_hostile_template_is_a_finding(tmp_path: Path) -> None:
    file = tmp_path / "loop.jinja"
    file.write_text(HOSTILE["endless loop"])
    started = time.monotonic()
    report = inspect(load_side(file))
    assert time.monotonic() - started < 30
    assert report.exit_code == 3
    (found,) = [f for f in report.findings if f.severity == "error"]
    assert found.id == "T003"
    assert "steps" in found.detail
