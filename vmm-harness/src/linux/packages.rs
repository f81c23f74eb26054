//! What a run needs from packages: QEMU, a kernel with its driver, and a shell.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use lzma_rust2::XzReader;

use super::LinuxError;
use super::apt::{Apt, Package, Suites};
use super::cache::Cache;
use super::progress::Progress;

/// QEMU 11.1, the first with a vfio-user client as Debian builds it, is only there.
const BACKPORTS: Suites = Suites {
    security: false,
    names: &["trixie-backports", "trixie"],
};

/// Debian 12's kernels, also the newer one offered for it.
const SECURITY: Suites = Suites {
    security: true,
    names: &["bookworm-security"],
};

/// The emulator, from x86 to x86.
const QEMU: &str = "qemu-system-x86";

/// Debian 12.
const STABLE: Suites = Suites {
    security: false,
    names: &["bookworm"],
};

/// A browser that is only ever controlled.
const BROWSER: &str = "chromium-headless-shell";

/// Where its libraries are.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/pulseaudio",
    "lib/x86_64-linux-gnu",
];

/// Where its fonts are named.
const FONTS_FILE: &str = "fonts.conf";
const FONTS: &str = r#"<fontconfig>
  <dir prefix="relative">usr/share/fonts</dir>
  <cachedir prefix="xdg">vmem-fonts</cachedir>
</fontconfig>
"#;

/// What a program takes from the machine it runs on.
const C_LIBRARY: [&str; 8] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libm.so.6",
    "libmvec.so.1",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
];

/// The guest's programs, in one file.
const BUSYBOX: &str = "busybox-static";

/// Names and versions of the packages an artefact is made of.
const VERSIONS: &str = "versions";

/// Modules of the driver and of what it needs, where a kernel has them as modules, in the order of their insertion.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_mem",
];

/// A kernel as Debian built it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelSeries {
    /// Debian 12's.
    V6_1,
    /// Debian 13's, built for Debian 12.
    V6_12,
    /// From Debian 13's backports.
    V7_2,
}

impl KernelSeries {
    /// As in `uname -r`.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        }
    }

    fn suites(self) -> Suites {
        match self {
            Self::V6_1 | Self::V6_12 => SECURITY,
            Self::V7_2 => BACKPORTS,
        }
    }
}

/// What every guest needs, in the cache: QEMU, and a shell for those that have use for one.
#[derive(Debug)]
pub(super) struct Tools(PathBuf);

impl Tools {
    /// Takes them from the cache, after filling that with what is missing.
    pub(super) fn get(cache: &Cache, progress: &mut Progress) -> Result<Self, LinuxError> {
        let tools = cache.get_or_make("tools", progress, |dir, progress| {
            from_packages(
                dir,
                "QEMU and busybox",
                BACKPORTS,
                progress,
                |apt, root, phase| apt.unpack(&[QEMU.into(), BUSYBOX.into()], true, root, phase),
            )
        })?;
        Ok(Self(tools))
    }

    /// What is used, by package and version.
    pub(super) fn versions(&self) -> Result<Vec<String>, LinuxError> {
        versions(&self.0, &[QEMU, BUSYBOX])
    }

    /// Root of the unpacked QEMU.
    pub(super) fn qemu_root(&self) -> PathBuf {
        self.0.join("root")
    }

    pub(super) fn busybox(&self) -> PathBuf {
        self.0.join("root/usr/bin/busybox")
    }
}

/// A browser without a window, in the cache: for tests of pages.
#[derive(Debug)]
pub struct Browser(PathBuf);

impl Browser {
    /// Takes it from the cache, after filling that with what is missing.
    ///
    /// # Errors
    ///
    /// If the packages cannot be had, as on a machine without apt or network.
    pub fn get(cache: &Cache, progress: &mut Progress) -> Result<Self, LinuxError> {
        let names = [BROWSER, "fonts-dejavu-core"].map(str::to_owned);
        let browser = cache.get_or_make("browser", progress, |dir, progress| {
            from_packages(dir, BROWSER, STABLE, progress, |apt, root, phase| {
                let packages = apt.unpack(&names, true, root, phase)?;
                // The C library is the machine's, with the loader that was built with it.
                for name in C_LIBRARY {
                    let path = root.join("lib/x86_64-linux-gnu").join(name);
                    if path.exists() {
                        fs::remove_file(&path).map_err(LinuxError::file(path))?;
                    }
                }
                fs::write(root.join(FONTS_FILE), FONTS).map_err(LinuxError::file(root))?;
                Ok(packages)
            })
        })?;
        Ok(Self(browser))
    }

    /// The program with the libraries and fonts it was built for, without arguments.
    #[must_use]
    pub fn command(&self) -> Command {
        let root = self.0.join("root");
        let libraries = LIBRARIES.map(|dir| root.join(dir).into_os_string());
        let mut command = Command::new(root.join("usr/lib/chromium").join(BROWSER));
        command
            .env("LD_LIBRARY_PATH", libraries.join(OsStr::new(":")))
            .env("FONTCONFIG_FILE", root.join(FONTS_FILE));
        command
    }
}

/// A kernel and its modules, in the cache.
#[derive(Debug)]
pub(super) struct LinuxKernel(PathBuf);

impl LinuxKernel {
    /// Takes it from the cache, after filling that with what is missing.
    pub(super) fn get(
        cache: &Cache,
        series: KernelSeries,
        progress: &mut Progress,
    ) -> Result<Self, LinuxError> {
        let name = format!("linux-{}", series.version());
        let kernel = cache.get_or_make(&name, progress, |dir, progress| {
            let title = format!("Linux {}", series.version());
            from_packages(
                dir,
                &title,
                series.suites(),
                progress,
                |apt, root, phase| {
                    let names = kernel_packages(apt, series)?;
                    let packages = apt.unpack(&names, false, root, phase)?;
                    keep_kernel(root, &names)?;
                    Ok(packages)
                },
            )
        })?;
        Ok(Self(kernel))
    }

    /// What is used, by package and version.
    pub(super) fn versions(&self) -> Result<Vec<String>, LinuxError> {
        versions(&self.0, &["linux-image-"])
    }

    pub(super) fn vmlinuz(&self) -> PathBuf {
        self.0.join("root/vmlinuz")
    }

    /// The modules to insert, in this order, by name and file.
    pub(super) fn modules(&self) -> Vec<(&'static str, PathBuf)> {
        let file = |name: &'static str| (name, self.0.join(format!("root/{name}.ko")));
        MODULES
            .into_iter()
            .map(file)
            .filter(|(_, path)| path.exists())
            .collect()
    }
}

/// What the packages with these beginnings are, of which an artefact was made.
fn versions(artefact: &Path, packages: &[&str]) -> Result<Vec<String>, LinuxError> {
    let path = artefact.join(VERSIONS);
    let text = fs::read_to_string(&path).map_err(LinuxError::file(path))?;
    let wanted = |line: &&str| packages.iter().any(|package| line.starts_with(package));
    Ok(text.lines().filter(wanted).map(str::to_owned).collect())
}

/// Makes an artefact: package lists, packages, and a record of what they were.
fn from_packages(
    dir: &Path,
    title: &str,
    suites: Suites,
    progress: &mut Progress,
    unpack: impl FnOnce(
        &Apt,
        &Path,
        &mut super::progress::Phase<'_>,
    ) -> Result<Vec<Package>, LinuxError>,
) -> Result<(), LinuxError> {
    let apt_dir = dir.join("apt");
    let mut phase = progress.phase(format!("package lists of {}", suites.names.join(" and ")));
    let apt = Apt::update(&apt_dir, suites, &mut phase)?;
    phase.done("");
    let mut phase = progress.phase(format!("packages of {title}"));
    let packages = unpack(&apt, &dir.join("root"), &mut phase)?;
    let bytes: u64 = packages.iter().map(Package::bytes).sum();
    phase.done(&format!(
        "{} packages, {:.1} MiB, ",
        packages.len(),
        super::apt::mib(bytes)
    ));
    let versions: String = packages
        .iter()
        .map(|package| format!("{package}\n"))
        .collect();
    let path = dir.join(VERSIONS);
    fs::write(&path, versions).map_err(LinuxError::file(path))?;
    fs::remove_dir_all(&apt_dir).map_err(LinuxError::file(apt_dir))
}

/// The packages of the newest kernel of a series: image, and from 7.x on binary and modules apart from it.
fn kernel_packages(apt: &Apt, series: KernelSeries) -> Result<Vec<String>, LinuxError> {
    let images = apt.names("linux-image-")?;
    let release =
        newest_release(&images, series.version()).ok_or_else(|| LinuxError::NoPackage {
            wanted: format!("linux-image-{}.*-cloud-amd64", series.version()),
            suites: series.suites().names.join(", "),
            found: images
                .iter()
                .filter(|name| name.ends_with("-cloud-amd64"))
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
        })?;
    let parts = ["linux-modules-", "linux-binary-", "linux-image-"]
        .map(|prefix| format!("{prefix}{release}"));
    let names = apt.names("linux-")?;
    Ok(parts
        .into_iter()
        .filter(|name| names.contains(name))
        .collect())
}

/// What `uname -r` says on the newest kernel of a series.
fn newest_release<'a>(images: &'a [String], series: &str) -> Option<&'a str> {
    let release = |name: &'a String| {
        let release = name.strip_prefix("linux-image-")?;
        let of_series = release.strip_prefix(series)?.starts_with('.');
        (of_series && release.ends_with("-cloud-amd64")).then_some(release)
    };
    let numbers = |release: &&str| -> Vec<u64> {
        let digits = release.split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|digits| digits.parse().ok()).collect()
    };
    images.iter().filter_map(release).max_by_key(numbers)
}

/// Leaves of an unpacked kernel what a run needs: the image and the modules, not compressed.
fn keep_kernel(root: &Path, packages: &[String]) -> Result<(), LinuxError> {
    let missing = |file: &str| LinuxError::NotInPackage {
        file: file.to_owned(),
        package: packages.join(", "),
    };
    let files = files_below(root)?;
    let find = |wanted: &dyn Fn(&str) -> bool| {
        files.iter().find(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(wanted)
        })
    };
    let vmlinuz = find(&|name| name == "vmlinuz" || name.starts_with("vmlinuz-"))
        .ok_or_else(|| missing("vmlinuz"))?;
    for module in MODULES {
        let (plain, xz) = (format!("{module}.ko"), format!("{module}.ko.xz"));
        let Some(path) = find(&|name| name == plain || name == xz) else {
            continue;
        };
        let mut file = BufReader::new(File::open(path).map_err(LinuxError::file(path))?);
        let mut bytes = Vec::new();
        let read = match path.extension().is_some_and(|extension| extension == "xz") {
            true => XzReader::new(file, false).read_to_end(&mut bytes),
            false => file.read_to_end(&mut bytes),
        };
        read.map_err(LinuxError::file(path))?;
        let kept = root.join(plain);
        fs::write(&kept, bytes).map_err(LinuxError::file(kept))?;
    }
    if !root.join("virtio_mem.ko").exists() {
        return Err(missing("virtio_mem.ko"));
    }
    fs::rename(vmlinuz, root.join("vmlinuz")).map_err(LinuxError::file(vmlinuz))?;
    for unpacked in ["boot", "lib", "usr"].map(|name| root.join(name)) {
        match fs::remove_dir_all(&unpacked) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LinuxError::file(unpacked)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>, LinuxError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(LinuxError::file(dir))? {
        let entry = entry.map_err(LinuxError::file(dir))?;
        let kind = entry.file_type().map_err(LinuxError::file(entry.path()))?;
        if kind.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_series_is_taken() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-amd64",
            "linux-image-6.1.0-58-cloud-amd64-dbg",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(newest_release(&names, "6.1"), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest_release(&names, "6.12"),
            Some("6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest_release(&names, "7.2"), None);
    }

    #[test]
    fn of_a_kernel_the_image_and_the_modules_are_kept() {
        // Where the image is, up to Linux 6 and after.
        for image in ["boot/vmlinuz-6", "usr/lib/modules/7/vmlinuz"] {
            let dir = tempfile::tempdir().unwrap();
            let put = |path: &str, text: &str| {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            };
            put(image, "image");
            let names = ["linux-image".to_owned()];
            let error = keep_kernel(dir.path(), &names).unwrap_err().to_string();
            assert_eq!(error, "virtio_mem.ko is not in the package linux-image");

            put(
                "lib/modules/6/kernel/drivers/virtio/virtio_mem.ko",
                "module",
            );
            keep_kernel(dir.path(), &names).unwrap();
            let mut left: Vec<_> = fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            left.sort();
            assert_eq!(left, ["virtio_mem.ko", "vmlinuz"]);
            assert_eq!(fs::read(dir.path().join("vmlinuz")).unwrap(), b"image");
        }
    }
}
