//! `vmem linux` where it cannot do what it is asked: what it says, and what it leaves behind.

#[expect(clippy::unwrap_used, reason = "a test that cannot be set up may panic")]
mod linux {
    use std::fs;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use tempfile::TempDir;

    /// Runs a script of `vmem linux` with an empty cache, after `set_up`; its exit code and standard error.
    ///
    /// Whatever happens, nothing that is not whole is left in the cache.
    fn vmem_linux(dir: &TempDir, set_up: impl FnOnce(&mut Command)) -> (i32, String) {
        let cache = dir.path().join("cache");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmem"));
        command
            .args(["linux", "--script", "grow-shrink", "--cache"])
            .arg(&cache);
        set_up(&mut command);
        let output = command.output().unwrap();
        let left: Vec<_> = fs::read_dir(cache.join("v1"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["lock"]);
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// A configuration of apt's with `sources` and no others; none where there is no apt.
    fn apt_config(test: &str, dir: &Path, sources: &str) -> Option<std::path::PathBuf> {
        if Command::new("apt-get").arg("--version").output().is_err() {
            // Past the capture of the test runner. Nobody is left to tell if it fails.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: there is no apt-get");
            return None;
        }
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        if !release.lines().any(|line| line == "ID=debian") {
            let reason = "there is no apt-get of Debian's";
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
            return None;
        }
        let (list, config) = (dir.join("sources.list"), dir.join("apt.conf"));
        fs::write(&list, sources).unwrap();
        let list = list.display();
        let text =
            format!("Dir::Etc::SourceList \"{list}\";\nDir::Etc::SourceParts \"/dev/null\";\n");
        fs::write(&config, text).unwrap();
        Some(config)
    }

    #[test]
    fn without_package_tools_it_says_which_one_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (code, error) = vmem_linux(&dir, |command| {
            command.env("PATH", dir.path());
        });
        assert_eq!(code, 1, "{error}");
        assert!(error.contains("vmem: dpkg cannot be run"), "{error}");
        assert!(error.contains("--cache"), "{error}");
    }

    #[test]
    fn packages_for_another_architecture_are_not_tried() {
        let dir = tempfile::tempdir().unwrap();
        let dpkg = dir.path().join("dpkg");
        // By a child: one that another test is about to start may have what is open here, and what is open for writing
        // cannot be executed.
        let write = "printf '#!/bin/sh\necho arm64\n' > \"$0\" && chmod 755 \"$0\"";
        let written = Command::new("sh").args(["-c", write]).arg(&dpkg).status();
        assert!(written.unwrap().success());
        let (code, error) = vmem_linux(&dir, |command| {
            command.env("PATH", dir.path());
        });
        assert_eq!(code, 1, "{error}");
        assert!(error.contains("this machine is arm64"), "{error}");
    }

    #[test]
    fn a_mirror_that_cannot_be_reached_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .unwrap_or("stable");
        let sources = format!("deb file:/nonexistent/mirror {codename} main\n");
        let Some(config) = apt_config(
            "a_mirror_that_cannot_be_reached_is_named",
            dir.path(),
            &sources,
        ) else {
            return;
        };
        let (code, error) = vmem_linux(&dir, |command| {
            command.env("APT_CONFIG", config);
        });
        assert_eq!(code, 1, "{error}");
        assert!(
            error.contains("apt-get update failed; is the package mirror reachable?"),
            "{error}"
        );
        assert!(error.contains("/nonexistent/mirror"), "{error}");
    }

    #[test]
    fn a_machine_that_does_not_follow_debian_has_no_mirror() {
        let dir = tempfile::tempdir().unwrap();
        let sources = "deb http://mirror.invalid/debian no-such-suite main\n";
        let test = "a_machine_that_does_not_follow_debian_has_no_mirror";
        let Some(config) = apt_config(test, dir.path(), sources) else {
            return;
        };
        let (code, error) = vmem_linux(&dir, |command| {
            command.env("APT_CONFIG", config);
        });
        assert_eq!(code, 1, "{error}");
        assert!(
            error.contains("no source for Debian's suite") && error.contains("APT_CONFIG"),
            "{error}"
        );
    }

    #[test]
    fn wait_for_another_one_that_fills_the_cache_is_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("v1")).unwrap();
        let lock = fs::File::create(dir.path().join("v1/lock")).unwrap();
        lock.lock().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmem"))
            .args(["linux", "--script", "grow-shrink", "--cache"])
            .arg(dir.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("waiting for another vmem") {
            assert_ne!(errors.read_line(&mut said).unwrap(), 0, "{said}");
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        // A second signal would have ended it as well, and hard; so would this file, were it let go.
        errors.read_to_string(&mut said).unwrap();
        assert!(said.ends_with("vmem: interrupted\n"), "{said}");
        assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
        drop(lock);
    }

    #[test]
    fn an_unknown_script_is_answered_with_the_known_ones() {
        let output = Command::new(env!("CARGO_BIN_EXE_vmem"))
            .args(["linux", "--script", "x"])
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.contains("grow-shrink") && error.contains("random"),
            "{error}"
        );
    }

    #[test]
    fn options_that_do_not_go_together_are_usage_errors() {
        for (line, wanted) in [
            ("--kernel ours --script grow-shrink", "for Linux kernels"),
            ("--kernel ours --matrix", "for Linux kernels"),
            ("--kernel 6.1,ours", "more than one kernel needs --matrix"),
            ("--device ours,qemu", "more than one device needs --matrix"),
            (
                "--kernel 6.1 --policy linux",
                "--policy is for --kernel ours",
            ),
            ("--kernel ours --minutes 0", "1..=1440"),
        ] {
            let output = Command::new(env!("CARGO_BIN_EXE_vmem"))
                .arg("linux")
                .args(line.split(' '))
                .output()
                .unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{line}: {error}");
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }
}
