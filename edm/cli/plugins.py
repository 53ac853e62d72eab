"""The command `edm plugins`: what is installed, and what is wrong with what cannot be used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import click

from edm.registry import KINDS, Offer, Registry

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--options", "with_options", is_flag=True, help="Print each plugin's options too.")
def command(as_json: bool, with_options: bool) -> None:
    """List fault sources, transports and stores, and who offers them."""
    offers, problems = Registry().all()
    if as_json:
        document = {"plugins": [_record(offer) for offer in offers], "problems": [attrs.asdict(p) for p in problems]}
        click.echo(json.dumps(document, indent=2, default=str))
    else:
        for line in _lines(offers, with_options):
            click.echo(line)
    for problem in problems:
        click.echo(f"edm: warning: {problem}", err=True)


def _record(offer: Offer) -> dict[str, Any]:
    return {
        "kind": offer.kind.name,
        "name": offer.spec.name,
        "summary": offer.spec.summary,
        "distribution": offer.distribution,
        "builtin": offer.builtin,
        "api": offer.spec.api,
        "options": {
            field.name: {"default": default, "help": field.metadata.get("help", "")}
            for field, default in _options(offer)
        },
    }


def _lines(offers: list[Offer], with_options: bool) -> Iterator[str]:
    width = max((len(offer.spec.name) for offer in offers), default=0)
    for kind in KINDS.values():
        yield f"{kind.title}s"
        for offer in offers:
            if offer.kind is not kind:
                continue
            by = "" if offer.builtin else f"  [{offer.distribution}]"
            yield f"  {offer.spec.name:{width}}  {offer.spec.summary}{by}"
            if with_options:
                for field, default in _options(offer):
                    yield f"  {'':{width}}    {field.name} = {default!r}  {field.metadata.get('help', '')}".rstrip()


def _options(offer: Offer) -> Iterator[tuple[attrs.Attribute[Any], Any]]:
    defaults = offer.spec.options()
    for field in attrs.fields(offer.spec.options):
        yield field, getattr(defaults, field.name)
