"""Write the generated parts of the protocol's pages anew: python -m tests.document."""

from tests.document.pages import PAGES, rendered


def main() -> None:
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        if after != before:
            page.write_text(after)
            print(f"{page} was written anew")


main()
