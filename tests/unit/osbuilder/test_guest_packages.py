"""Which packages a named one brings: dependencies, but not the base system and not libraries."""

from katapod.osbuilder.packages import follow_dependencies, parse_packages

STATUS = "\n".join(
    "\t".join(fields)
    for fields in [
        ("ii ", "tool", "amd64", "optional", "no", "admin", "", ", libc6 (>= 2.36), base, helper (>= 1) | other, mta"),
        ("ii ", "helper", "all", "optional", "no", "perl", "", "tool:any, libfoo"),
        ("ii ", "libc6", "amd64", "optional", "no", "libs", "", ""),
        ("ii ", "libfoo", "amd64", "optional", "no", "libs", "", ""),
        ("ii ", "base", "amd64", "required", "yes", "admin", "", ""),
        ("ii ", "postfix", "amd64", "optional", "no", "mail", "mta, smtp (= 1)", ""),
        ("rc ", "removed", "amd64", "optional", "no", "admin", "", ""),
        ("ii ", "tool", "i386", "optional", "no", "admin", "", ""),
    ]
)


def test_only_what_is_installed_counts() -> None:
    assert sorted(parse_packages(STATUS)) == ["base", "helper", "libc6", "libfoo", "postfix", "tool"]
    assert parse_packages(STATUS)["tool"].architecture == "amd64"


def test_dependencies_are_followed_in_a_circle_and_through_what_provides_them() -> None:
    assert follow_dependencies(["tool"], parse_packages(STATUS)) == ["tool", "helper", "postfix"]


def test_what_is_named_comes_whatever_it_is() -> None:
    assert follow_dependencies(["base", "libfoo"], parse_packages(STATUS)) == ["base", "libfoo"]
