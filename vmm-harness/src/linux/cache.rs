//! A folder of artefacts, each complete or absent.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::LinuxError;
use super::progress::Progress;
use crate::signals;

/// Part of every path: a layout that older programs would misread gets a new number.
const LAYOUT: &str = "v1";

/// How often a lock that another process has is tried.
const LOOK: Duration = Duration::from_millis(100);

/// Where artefacts are kept between runs.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The folder artefacts are kept in unless told otherwise: `$XDG_CACHE_HOME/vmem`, or `~/.cache/vmem`.
    #[must_use]
    pub fn default_path() -> Option<PathBuf> {
        // A relative path is to be ignored, see the XDG base directory specification.
        let absolute = |name| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Some(caches?.join("vmem"))
    }

    /// Uses `path`, which need not exist.
    ///
    /// # Errors
    ///
    /// If the folder cannot be made.
    pub fn open(path: &Path) -> Result<Self, LinuxError> {
        let root = path.join(LAYOUT);
        fs::create_dir_all(&root).map_err(LinuxError::file(&root))?;
        // Programs are started from other folders than this one.
        let root = root.canonicalize().map_err(LinuxError::file(&root))?;
        Ok(Self { root })
    }

    /// The artefact, if it is complete.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<PathBuf> {
        let path = self.root.join(name);
        path.is_dir().then_some(path)
    }

    /// The artefact, made by `make` in a folder of its own if it is not there yet.
    ///
    /// # Errors
    ///
    /// What `make` says; or a folder or the lock cannot be made.
    pub fn get_or_make(
        &self,
        name: &str,
        progress: &mut Progress,
        make: impl FnOnce(&Path, &mut Progress) -> Result<(), LinuxError>,
    ) -> Result<PathBuf, LinuxError> {
        if let Some(path) = self.get(name) {
            return Ok(path);
        }
        let _lock = self.lock(progress)?;
        // Whoever held the lock may have made it.
        if let Some(path) = self.get(name) {
            return Ok(path);
        }
        let (path, unfinished) = (self.root.join(name), self.unfinished(name));
        // One is left when a run was killed; the lock says that nobody works in it.
        remove_dir_if_there(&unfinished)?;
        fs::create_dir_all(&unfinished).map_err(LinuxError::file(&unfinished))?;
        let made = make(&unfinished, progress).and_then(|()| {
            fs::rename(&unfinished, &path).map_err(LinuxError::file(&path))?;
            Ok(path)
        });
        if made.is_err()
            && let Err(error) = remove_dir_if_there(&unfinished)
        {
            log::warn!("what is unfinished stays: {error}");
        }
        made
    }

    fn unfinished(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.unfinished"))
    }

    fn lock(&self, progress: &mut Progress) -> Result<File, LinuxError> {
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(LinuxError::file(&path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(LinuxError::File { path, source }),
            }
            if !std::mem::replace(&mut told, true) {
                progress.note("waiting for another vmem, which fills the cache");
            }
            // A wait in the kernel would go on after a signal.
            if signals::interrupted() {
                return Err(LinuxError::Interrupted);
            }
            thread::sleep(LOOK);
        }
    }
}

fn remove_dir_if_there(path: &Path) -> Result<(), LinuxError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LinuxError::file(path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn scratch() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        (dir, cache)
    }

    #[test]
    fn an_artefact_is_complete_or_absent() {
        let (_dir, cache) = scratch();
        let mut progress = Progress::silent();
        let error = cache.get_or_make("a", &mut progress, |dir, _| {
            fs::write(dir.join("half"), "").unwrap();
            Err(LinuxError::Interrupted)
        });
        assert!(matches!(error, Err(LinuxError::Interrupted)), "{error:?}");
        assert_eq!(cache.get("a"), None);
        assert!(!cache.unfinished("a").exists());

        // What a killed run left behind does not get into what is made now.
        fs::create_dir(cache.unfinished("a")).unwrap();
        fs::write(cache.unfinished("a").join("half"), "").unwrap();
        let made = cache.get_or_make("a", &mut progress, |dir, _| {
            fs::write(dir.join("whole"), "").map_err(LinuxError::file(dir))
        });
        let made = made.unwrap();
        assert_eq!(cache.get("a").as_ref(), Some(&made));
        let names: Vec<_> = fs::read_dir(made)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["whole"]);
    }

    #[test]
    fn first_error_is_the_one_that_is_told() {
        let (_dir, cache) = scratch();
        let error = cache.get_or_make("a", &mut Progress::silent(), |dir, _| {
            // It cannot be removed as a folder.
            fs::remove_dir(dir).unwrap();
            fs::write(dir, "").unwrap();
            Err(LinuxError::Interrupted)
        });
        assert!(matches!(error, Err(LinuxError::Interrupted)), "{error:?}");
    }

    #[test]
    fn two_that_want_the_same_make_it_once() {
        let (_dir, cache) = scratch();
        let (begun, made) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    begun.fetch_add(1, Ordering::Relaxed);
                    let path = cache.get_or_make("a", &mut Progress::silent(), |_, _| {
                        made.fetch_add(1, Ordering::Relaxed);
                        // It takes long enough for the others to want it, too.
                        while begun.load(Ordering::Relaxed) < 4 {
                            thread::yield_now();
                        }
                        thread::sleep(Duration::from_millis(50));
                        Ok(())
                    });
                    assert!(path.unwrap().is_dir());
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
