#!/usr/bin/python
"""Module ``preflight_reach``: whether the host reaches what packages and images come from."""

from __future__ import annotations

import base64
import os
import re
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: preflight_reach
short_description: Tells whether the host reaches what packages and images come from
description:
  - Asks the sources of its own apt, those of the images, and the package index, all at once.
  - Leaves nothing on the host, and does the same in check mode.
options:
  apt_sources:
    description: apt source lines for the images.
    type: list
    elements: str
    default: []
  package_index:
    description: Python package index, with user and password where it wants them; empty means that none is asked.
    type: str
    default: ""
  ca_certificates:
    description: Certificates in PEM that the images trust beside Debian's own.
    type: str
    default: ""
  timeout:
    description: Seconds that an answer may take.
    type: int
    default: 10
"""

RETURN = """
host_sources:
  description: Why apt cannot use the host's own sources, a reason for each that it cannot.
  type: list
image_sources:
  description: Why apt could not use those of the images.
  type: list
package_index:
  description: Why the package index cannot be used; empty if it can.
  type: str
untrusted:
  description: Whether that is because the images would not trust its certificate.
  type: bool
"""

AUTHORITIES = Path("/usr/share/ca-certificates")
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n", re.DOTALL)
UNCACHED = ("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")


def run(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command and give its result with its output as text; it is ended after ``timeout`` seconds."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env={**os.environ, "LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"E: no answer after {timeout:.0f} s")


def first_error(text: str) -> str:
    """Give the first error that apt names, in its own words, which have no passwords."""
    errors = [line.removeprefix("E: ") for line in text.splitlines() if line.startswith("E: ")]
    reason = re.sub(r"^Failed to fetch (\S+) +", r"\1: ", errors[0]) if errors else "it gives no reason"
    return re.sub(r" +", " ", reason)


def releases(*options: str) -> tuple[list[str], str]:
    """Give the addresses of the releases that apt would look at, and why it would not."""
    listed = run("apt-get", *UNCACHED, *options, "update", "--print-uris", timeout=60)
    addresses = re.findall(r"^'(https?://\S+/InRelease)'", listed.stdout, re.MULTILINE)
    return sorted(set(addresses)), first_error(listed.stderr) if listed.returncode else ""


def fetch_error(address: str, timeout: int) -> str:
    """Say why apt cannot fetch the release at an address; empty if it can."""
    limits = [f"-oAcquire::{scheme}::Timeout={timeout}" for scheme in ("http", "https")]
    with tempfile.TemporaryDirectory(prefix="data-platform-") as folder:
        for name in ("InRelease", "Release"):
            fetched = run(
                "/usr/lib/apt/apt-helper",
                *limits,
                "-oAcquire::Retries=0",
                "-oAPT::Sandbox::User=root",
                "download-file",
                address.removesuffix("InRelease") + name,
                f"{folder}/{name}",
                timeout=3 * timeout,
            )
            if not fetched.returncode:
                return ""
            if " 404 " not in fetched.stderr:
                break
    return first_error(fetched.stderr)


def sources_errors(lines: list[str] | None, timeout: int, pool: ThreadPoolExecutor) -> list[str]:
    """Say why apt cannot use sources.

    Args:
        lines: Source lines; None means those of the host.
        timeout: Seconds that an answer may take.
        pool: Where the sources are asked, all at once.
    """
    if lines is None:
        addresses, error = releases()
    else:
        with tempfile.TemporaryDirectory(prefix="data-platform-") as folder:
            given = Path(folder, "images.list")
            given.write_text("".join(f"{line}\n" for line in lines))
            addresses, error = releases("-oDir::Etc::SourceParts=/dev/null", f"-oDir::Etc::SourceList={given}")
            error = error.replace(str(given), "them")
    return [error] if error else sorted(filter(None, pool.map(lambda one: fetch_error(one, timeout), addresses)))


def trust(certificates: str) -> ssl.SSLContext:
    """Give a context that trusts Debian's authorities and ``certificates``, in PEM, but no others that the host may.

    Where the host has none of Debian's, nothing can be said of trust, and the context trusts everybody.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authorities = "".join(file.read_text() for file in sorted(AUTHORITIES.rglob("*.crt")))
    if authorities:
        context.load_verify_locations(cadata="".join(CERTIFICATE.findall(f"{authorities}\n{certificates}\n")))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def index_error(index: str, certificates: str, timeout: int) -> tuple[str, bool]:
    """Say why a package index cannot be used, and whether it is for its certificate; empty if it can be.

    Args:
        index: Its address, with user and password where it wants them; empty means that none is asked.
        certificates: What is trusted beside Debian's authorities, in PEM.
        timeout: Seconds that an answer may take.
    """
    if not index:
        return "", False
    try:
        parts = urlsplit(index)
        account, _, place = parts.netloc.rpartition("@")
        if parts.scheme not in ("http", "https"):
            raise ValueError
        # The images' own first wish; many an index refuses to list all that it has.
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=place, path=f"{parts.path.rstrip('/')}/uv/")))
        if account:
            token = base64.b64encode(unquote(account).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trust(certificates)))
        with opener.open(request, timeout=timeout):
            return "", False
    except urllib.error.HTTPError as error:
        return f"it answers {error.code} {error.reason}", False
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return error.reason.verify_message, True
        return getattr(error.reason, "strerror", None) or str(error.reason), False
    except (OSError, HTTPException) as error:
        return str(error), False
    except ValueError:
        return "it is no address of http or https", False


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        {
            "apt_sources": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "package_index": {"type": "str", "default": "", "no_log": True},
            "ca_certificates": {"type": "str", "default": "", "no_log": True},
            "timeout": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    given = module.params
    with ThreadPoolExecutor(16) as pool:
        index = pool.submit(index_error, given["package_index"], given["ca_certificates"], given["timeout"])
        host = sources_errors(None, given["timeout"], pool)
        images = sources_errors(given["apt_sources"], given["timeout"], pool)
        reason, untrusted = index.result()
    module.exit_json(changed=False, host_sources=host, image_sources=images, package_index=reason, untrusted=untrusted)


if __name__ == "__main__":
    main()
