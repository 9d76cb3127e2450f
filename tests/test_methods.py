"""Every method of the configuration is built from its name, and depends on its own modules only."""

import ast
from pathlib import Path

import pytest
import torch

import compdiff
from compdiff import methods
from compdiff.attributes import Attribute, Schema
from compdiff.config import METHODS, FairConfig, HCNConfig
from compdiff.interfaces import NoReweighter
from compdiff.stages import STAGES

SOURCES = Path(compdiff.__file__).parent
OPTIONAL = {"hcn", "flat", "fairdiffusion", "reference", "auxiliary"}  # modules of some methods, not of all


def imported(module):
    """compdiff modules that a module's source imports, directly or through others."""
    found, waiting = set(), [module]
    while waiting:
        for node in ast.walk(ast.parse((SOURCES / f"{waiting.pop()}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compdiff"):
                names = [node.module.removeprefix("compdiff.")] if "." in node.module else [a.name for a in node.names]
                waiting += [name for name in names if name not in found]
                found.update(names)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_built_and_trains(method):
    sizes, config = (5, 2, 4), HCNConfig(d_node=4, aux_hidden=4)
    conditioner = methods.build_conditioner(METHODS[method].conditioner, sizes, 8, config, age_index=0)
    schema = Schema((Attribute("age", tuple("abcde")), Attribute("sex", ("m", "f")), Attribute("race", tuple("abcd"))))
    reweighter = methods.build_reweighter(METHODS[method].fair, schema, FairConfig())
    attributes, generator = torch.tensor([[0, 1, 2], [4, 0, 3]]), torch.Generator().manual_seed(0)
    output = conditioner(attributes)
    assert output.tokens.shape == (2, conditioner.n_tokens, 8)
    assert all(loss.shape == (2,) for loss in conditioner.penalties(output, attributes, 0.5).values())
    assert reweighter.weights(attributes, generator).shape == (2,)
    reweighter.observe(torch.tensor([1.0, 2.0]), attributes, generator, 0)
    reweighter.load_state_dict(reweighter.state_dict())
    assert len(reweighter.history) == METHODS[method].fair


def test_a_method_depends_on_its_own_modules_only():
    assert imported("methods") & OPTIONAL == set()
    assert imported("flat") & OPTIONAL == {"auxiliary"}
    assert imported("fairdiffusion") & OPTIONAL == set()
    assert imported("hcn") & OPTIONAL == {"auxiliary", "reference"}


@pytest.mark.parametrize("method", METHODS)
def test_the_stage_table_names_the_modules_of_what_it_trains(method):
    conditioner, fair = METHODS[method].conditioner, METHODS[method].fair
    needed = {methods.CONDITIONERS[conditioner][0]} if conditioner != "none" else set()
    needed |= {methods.REWEIGHTER[0]} if fair else set()
    (stage,) = [stage for stage in STAGES if method in stage.trains]
    assert needed <= {f"compdiff.{name}" for name in stage.loads}


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="unknown conditioner 'hcnn'; known: none, flat, flat_separate, hcn"):
        methods.build_conditioner("hcnn", (2, 2), 8, HCNConfig())


def test_no_reweighter_weighs_all_alike():
    none = NoReweighter()
    assert torch.equal(none.weights(torch.zeros(3, 2).long(), torch.Generator()), torch.ones(3))
    with pytest.raises(ValueError, match="another reweighter"):
        none.load_state_dict({"sigma": torch.ones(2)})
