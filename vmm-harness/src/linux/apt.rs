//! Debian packages without installing anything: apt-get and dpkg, with state and cache of their own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use super::LinuxError;
use super::progress::Phase;
use super::signals;
use super::sources::Source;

/// Debian's name for the only architecture the packages are wanted for.
const ARCHITECTURE: &str = "amd64";

/// How often a download is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Suites that are used together, all of one mirror.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suites {
    /// Whether the mirror is that of security updates.
    pub(super) security: bool,
    /// The suites; the first one is preferred, the others complete it.
    pub(super) names: &'static [&'static str],
}

/// A package that can be downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    name: String,
    version: String,
    bytes: u64,
}

impl Package {
    /// Size of the download.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl std::fmt::Display for Package {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// apt-get with a configuration derived from the machine's.
///
/// Everything apt writes goes to one folder. The machine's options (proxies, certificates) stay in force, but for the
/// programs it runs around an update: they would change the machine.
#[derive(Debug)]
pub(super) struct Apt {
    dir: PathBuf,
    suites: Suites,
}

impl Apt {
    /// Prepares `dir` and fetches the package lists.
    pub(super) fn update(
        dir: &Path,
        suites: Suites,
        phase: &mut Phase<'_>,
    ) -> Result<Self, LinuxError> {
        check_architecture(&capture(
            "dpkg",
            Command::new("dpkg").arg("--print-architecture"),
        )?)?;
        let apt = Self {
            dir: dir.to_owned(),
            suites,
        };
        for needed in ["lists/partial", "archives/partial"] {
            let needed = dir.join(needed);
            fs::create_dir_all(&needed).map_err(LinuxError::file(needed))?;
        }
        // Nothing is installed: what a package needs is downloaded down to the C library.
        for (name, text) in [
            ("status", String::new()),
            ("vmem.sources", machine_sources(suites)?),
            ("apt.conf", machine_options()?),
        ] {
            let path = dir.join(name);
            fs::write(&path, text).map_err(LinuxError::file(path))?;
        }
        // `Error-Mode=any`: a mirror that is out of reach is an error, not a warning.
        apt.run(
            &["update", "-q", "-o", "APT::Update::Error-Mode=any"],
            "lists",
            None,
            phase,
        )?;
        Ok(apt)
    }

    /// Names of packages that begin with `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>, LinuxError> {
        let names = capture(
            "apt-cache",
            self.command("apt-cache").args(["pkgnames", prefix]),
        )?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads packages, with all they need if `closure`, and unpacks them into `into`.
    pub(super) fn unpack(
        &self,
        names: &[String],
        closure: bool,
        into: &Path,
        phase: &mut Phase<'_>,
    ) -> Result<Vec<Package>, LinuxError> {
        let preferred = format!("APT::Default-Release={}", self.suites.names[0]);
        let mut args = match closure {
            true => vec![
                "install",
                "--download-only",
                "--yes",
                "--no-install-recommends",
            ],
            false => vec!["download"],
        };
        args.extend(["-q", "-o", &preferred]);
        args.extend(names.iter().map(String::as_str));
        let uris = capture(
            "apt-get",
            self.command("apt-get")
                .args(&args)
                .args(["--print-uris", "-qq"]),
        )?;
        let packages: Vec<_> = uris.lines().filter_map(read_uri).collect();
        let total = packages.iter().map(|package| package.bytes).sum();
        self.run(&args, "archives", Some(total), phase)?;

        fs::create_dir_all(into).map_err(LinuxError::file(into))?;
        let archives = self.dir.join("archives");
        for entry in fs::read_dir(&archives).map_err(LinuxError::file(&archives))? {
            let path = entry.map_err(LinuxError::file(&archives))?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                phase.tick("unpacking");
                capture("dpkg", Command::new("dpkg").arg("-x").arg(&path).arg(into))?;
                fs::remove_file(&path).map_err(LinuxError::file(path))?;
            }
        }
        Ok(packages)
    }

    /// A command of apt's that keeps to this folder.
    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for (option, value) in [
            ("Dir::Etc::SourceList", format!("{dir}/vmem.sources")),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            // Pins are about what the machine installs.
            ("Dir::Etc::Preferences", "/dev/null".into()),
            ("Dir::Etc::PreferencesParts", "/dev/null".into()),
            ("Dir::State", format!("{dir}")),
            ("Dir::State::Lists", format!("{dir}/lists")),
            ("Dir::State::Status", format!("{dir}/status")),
            ("Dir::Cache", format!("{dir}")),
            ("Dir::Cache::Archives", format!("{dir}/archives")),
            ("APT::Architecture", ARCHITECTURE.into()),
            ("APT::Architectures", ARCHITECTURE.into()),
            ("Acquire::Languages", "none".into()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".into(),
            ),
            // The user apt downloads as, where it may choose, has no access to this folder.
            ("APT::Sandbox::User", "root".into()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        // `apt-get download` writes there.
        command
            .current_dir(self.dir.join("archives"))
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        command
    }

    /// Runs apt-get and shows how much has arrived in the folder `watched`.
    fn run(
        &self,
        args: &[&str],
        watched: &str,
        total: Option<u64>,
        phase: &mut Phase<'_>,
    ) -> Result<(), LinuxError> {
        let log_path = self.dir.join("log");
        let log = fs::File::create(&log_path).map_err(LinuxError::file(&log_path))?;
        let errors = log.try_clone().map_err(LinuxError::file(&log_path))?;
        let mut command = self.command("apt-get");
        let mut child = command
            .args(args)
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(tool("apt-get"))?;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(tool("apt-get"))? {
                break status;
            }
            if signals::interrupted() {
                // If it cannot be killed it has ended.
                let _ = child.kill();
                child.wait().map_err(tool("apt-get"))?;
                return Err(LinuxError::Interrupted);
            }
            let (arrived, total) = (mib(folder_size(&self.dir.join(watched))), total.map(mib));
            phase.tick(&total.map_or_else(
                || format!("{arrived:.0} MiB,"),
                |total| format!("{arrived:.0} of {total:.0} MiB,"),
            ));
            std::thread::sleep(LOOK);
        };
        if status.success() {
            return Ok(());
        }
        // A terminal interrupts apt as well.
        if signals::interrupted() {
            return Err(LinuxError::Interrupted);
        }
        let said = fs::read_to_string(&log_path).map_err(LinuxError::file(&log_path))?;
        Err(LinuxError::Packages {
            what: format!("apt-get {}", args[0]),
            said: last_lines(&said),
        })
    }
}

/// The options of the machine without its hooks, and without the files they come from, which apt would read again.
fn machine_options() -> Result<String, LinuxError> {
    let dump = capture("apt-config", Command::new("apt-config").arg("dump"))?;
    Ok(without_hooks(&dump))
}

fn without_hooks(dump: &str) -> String {
    let hooks = ["APT::Update::", "DPkg::Pre-", "DPkg::Post-"];
    let kept = dump.lines().filter(|line| {
        let read_again = ["Dir::Etc::parts ", "Dir::Etc::main "];
        let is = |name: &&str| {
            line.get(..name.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(name))
        };
        !hooks.iter().chain(&read_again).any(is)
    });
    let mut text = String::new();
    for line in kept.chain([
        "Dir::Etc::parts \"/dev/null\";",
        "Dir::Etc::main \"/dev/null\";",
    ]) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// The sources of the machine, for `suites` instead of those it follows.
fn machine_sources(suites: Suites) -> Result<String, LinuxError> {
    let shell = [
        "shell",
        "LIST",
        "Dir::Etc::SourceList/f",
        "PARTS",
        "Dir::Etc::SourceParts/d",
    ];
    let settings = capture("apt-config", Command::new("apt-config").args(shell))?;
    let setting = |name: &str| {
        let line = settings
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        PathBuf::from(line.unwrap_or_default().trim_matches('\''))
    };
    let (list, parts) = (setting("LIST"), setting("PARTS"));
    let mut files = vec![list.clone()];
    // A folder that is not there holds no files; the same for files below.
    files.extend(
        fs::read_dir(&parts)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "list" || extension == "sources")
            }),
    );
    files.sort();
    let read = |path: &PathBuf| Some(Source::read(path, &fs::read_to_string(path).ok()?));
    let sources: Vec<_> = files.iter().filter_map(read).flatten().collect();

    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.unwrap_or("stable").trim_matches('"');
    let suite = format!(
        "{codename}{}",
        if suites.security { "-security" } else { "" }
    );
    let source = Source::of_suite(&sources, &suite).ok_or_else(|| LinuxError::NoMirror {
        suite,
        files: format!("{}, {}", list.display(), parts.display()),
    })?;
    Ok(source.stanza(suites.names))
}

/// Whether the packages are for this machine, by dpkg's name of it.
fn check_architecture(dpkg: &str) -> Result<(), LinuxError> {
    match dpkg.trim() {
        ARCHITECTURE => Ok(()),
        other => Err(LinuxError::Architecture(other.to_owned())),
    }
}

/// `'URI' NAME_VERSION_ARCHITECTURE.deb BYTES HASH`, with `%3a` for a colon.
fn read_uri(line: &str) -> Option<Package> {
    let mut words = line.split_whitespace().skip(1);
    let mut file = words.next()?.split('_');
    let (name, version) = (file.next()?.to_owned(), file.next()?.replace("%3a", ":"));
    Some(Package {
        name,
        version,
        bytes: words.next()?.parse().ok()?,
    })
}

/// Runs a tool that is done at once, for its output.
fn capture(program: &'static str, command: &mut Command) -> Result<String, LinuxError> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().map_err(tool(program))?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = last_lines(&String::from_utf8_lossy(&stderr));
    Err(LinuxError::Packages {
        what: program.to_owned(),
        said,
    })
}

fn tool(program: &'static str) -> impl FnOnce(io::Error) -> LinuxError {
    move |source| LinuxError::Tool { program, source }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// Bytes in a folder and the folders in it. What disappears meanwhile counts nothing.
fn folder_size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => folder_size(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

pub(super) fn mib(bytes: u64) -> f64 {
    let (whole, rest) = (bytes >> 20, bytes & 0xf_ffff);
    // Downloads are far below the 4 PiB at which this is not exact any more.
    f64::from(u32::try_from(whole).unwrap_or(u32::MAX))
        + f64::from(u32::try_from(rest).unwrap_or(0)) / 1_048_576.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_options_stay_but_for_what_it_runs_around_an_update() {
        let dump = "Acquire::http::Proxy \"p\";\nAPT::Update::Post-Invoke:: \"rm\";\nDPkg::Pre-Install-Pkgs \"\";\n\
                    Dir::Etc::parts \"apt.conf.d\";\nDir::Etc::main \"apt.conf\";\nDir::Etc::trusted \"t\";\n";
        assert_eq!(
            without_hooks(dump),
            "Acquire::http::Proxy \"p\";\nDir::Etc::trusted \"t\";\n\
             Dir::Etc::parts \"/dev/null\";\nDir::Etc::main \"/dev/null\";\n"
        );
    }

    #[test]
    fn packages_are_for_one_architecture() {
        assert!(check_architecture("amd64\n").is_ok());
        let error = check_architecture("arm64\n").unwrap_err().to_string();
        assert!(error.contains("this machine is arm64"), "{error}");
    }

    #[test]
    fn what_is_downloaded_is_known_by_version_and_size() {
        let line = "'http://mirror.example/q.deb' qemu-system-x86_1%3a11.1.3+ds-1~bpo13+1_amd64.deb 10377056 SHA256:00";
        let package = read_uri(line).unwrap();
        assert_eq!(package.to_string(), "qemu-system-x86 1:11.1.3+ds-1~bpo13+1");
        assert_eq!(package.bytes, 10_377_056);
        assert_eq!(read_uri("Reading package lists..."), None);
    }
}
