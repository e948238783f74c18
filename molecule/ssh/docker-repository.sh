#!/bin/bash
# Makes a repository that is laid out and signed as Docker's own is, with Debian's engine under the names of Docker's
# packages, and serves it on the host's loopback.
set -euo pipefail

repack() { # OLD NEW
  apt-get download --quiet --quiet -o APT::Sandbox::User=root "$1"
  dpkg-deb --raw-extract "$1"_*.deb "/srv/packages/$2"
  sed -i -e "s/^Package: .*/Package: $2/" -e '/^Conflicts: /d' -e 's/ containerd ([^)]*),/ containerd.io,/' "/srv/packages/$2/DEBIAN/control"
}

empty() { # NEW
  mkdir -p "/srv/packages/$1/DEBIAN"
  printf '%s\n' "Package: $1" 'Version: 1' 'Architecture: all' 'Maintainer: nobody' 'Description: none' > "/srv/packages/$1/DEBIAN/control"
}

apt-get update --quiet --quiet
apt-get install --quiet --quiet --yes --no-install-recommends apt-utils gpg gpg-agent
architecture=$(dpkg --print-architecture)
mkdir -p /srv/packages "/srv/linux/debian/dists/bookworm/stable/binary-$architecture" /srv/linux/debian/pool
cd /srv
repack docker.io docker-ce
repack containerd containerd.io
empty docker-ce-cli
empty docker-buildx-plugin

cd /srv/linux/debian
for package in /srv/packages/*; do
  dpkg-deb -Znone --build "$package" pool
done
apt-ftparchive packages pool > "dists/bookworm/stable/binary-$architecture/Packages"
fields=(Codename=bookworm Suite=bookworm Components=stable "Architectures=$architecture")
apt-ftparchive "${fields[@]/#/-oAPT::FTPArchive::Release::}" release dists/bookworm > /srv/Release
gpg --batch --passphrase '' --quick-generate-key repository@example.com
gpg --batch --output dists/bookworm/InRelease --clearsign /srv/Release
gpg --output gpg --armor --export
systemd-run --unit=docker-repository python3 -m http.server 8000 --bind 127.0.0.1 --directory /srv
