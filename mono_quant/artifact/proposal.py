"""What a pull request says: what is in it, what merging it would do, and how to try it before."""

from mono_quant.artifact.cards import CardFacts, encoder_call
from mono_quant.io.hub.target import Target


def proposal(facts: CardFacts, target: Target) -> str:
    """Return the text of a pull request as Markdown.

    Args:
        facts: of the model that is proposed.
        target: the repository, at the commit on which it is planned.
    """
    origin, repo_id = facts.origin, target.repo_id
    source = f"`{origin.repo_id}` at commit `{origin.sha}`" if origin.repo_id else "a local model"
    call = [encoder_call(facts.encoder)] if facts.kind == "sentence_transformer" else []
    lines = [
        f"This pull request was made by mono_quant {facts.versions['mono_quant']} from {source}: {facts.report.summary}.",
        "",
        "Its card says what is quantized, what is not and why, and how close the output is to the original's.",
        "",
        "## Try it before it is merged",
        "",
        "```python",
        "import mono_quant",
        "",
        "number = 1  # of this pull request",
        f'model = mono_quant.load("{repo_id}", revision=f"refs/pr/{{number}}")',
        *call,
        "```",
        "",
        "## What merging it does",
        "",
        f'The weights that are here are replaced. They stay in the history: `revision="{target.facts.sha}"` gives them back. To have '
        f"both side by side, leave this pull request open, or push to a repository of its own.",
    ]
    return "\n".join(lines)
