"""Write docs/reproduce.md from experiments/*.yaml and the committed results: python scripts/make_reproduce.py."""

from dpopt.tables import reproduce_page, spec

if __name__ == "__main__":
    (spec.ROOT / "docs" / "reproduce.md").write_text(reproduce_page.page())
