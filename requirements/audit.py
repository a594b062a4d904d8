"""`make audit`: known vulnerabilities of the packages in the lock files, by pip-audit.

pip-audit exits with 1 both for a vulnerability and for a service that it cannot reach. Only in the first case it writes a report.
In the second nothing is known: that is printed, and does not fail the build.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LOCKS = ("build.txt", "run.txt", "develop.txt", "bench.txt")
TIMEOUT_S = 15
UNREACHABLE = ("connect", "timed out", "timeout", "requests.exceptions")


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
        command += ["--timeout", str(TIMEOUT_S), "--format", "json", "--output", str(report)]
        for name in LOCKS:
            command += ["--requirement", str(HERE / name)]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own command
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    if not text:
        if not any(words in ran.stderr.lower() for words in UNREACHABLE):
            print(f"audit: pip-audit failed:\n{ran.stderr}", file=sys.stderr)
            return 1
        cause = ran.stderr.strip().splitlines()[-1].partition(":")[0]
        print(f"audit: not done, the vulnerability service cannot be reached from here ({cause})")
        return 0
    packages = json.loads(text)["dependencies"]
    found = [(package, one) for package in packages for one in package.get("vulns", [])]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no release yet"
        print(f"audit: {package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"audit: {len(packages)} locked packages, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
