//! Every kind of backing, and the huge pages some of them need.

use std::fs::File;
use std::io;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_mem::wire::{Request, Response, Span};
use virtio_mem::{Anonymous, Backing, Builder, Hugetlb, Memfd, PrivateFile};

use super::{GIB, MIB, REGION, Rig};

/// Blocks of the region of [`rig_of`].
pub const BLOCKS: u64 = 8;

/// A kind of backing and what a test of it takes.
pub struct Kind {
    pub name: &'static str,
    pub block_size: u64,
    /// Bytes per page of the pool it takes memory from.
    pub pool: Option<u64>,
    pub make: fn(u64) -> io::Result<Box<dyn Backing>>,
}

/// What the pages of the snapshot hold that [`PrivateFile`] starts from.
pub const SNAPSHOT_TAG: u8 = 0x5c;

pub const KINDS: [Kind; 6] = [
    Kind {
        name: "anonymous, base pages",
        block_size: 2 * MIB,
        pool: None,
        make: |len| Ok(Box::new(Anonymous::base_pages(len)?)),
    },
    Kind {
        name: "anonymous, THP",
        block_size: 2 * MIB,
        pool: None,
        make: |len| Ok(Box::new(Anonymous::thp(len)?)),
    },
    Kind {
        name: "memfd",
        block_size: 2 * MIB,
        pool: None,
        make: |len| Ok(Box::new(Memfd::new(len)?)),
    },
    Kind {
        name: "private file",
        block_size: 2 * MIB,
        pool: None,
        make: |len| Ok(Box::new(PrivateFile::new(&snapshot(len)?, 0, len)?)),
    },
    Kind {
        name: "hugetlb, 2 MiB",
        block_size: 2 * MIB,
        pool: Some(2 * MIB),
        make: |len| Ok(Box::new(Hugetlb::pages_2m(len)?)),
    },
    Kind {
        name: "hugetlb, 1 GiB",
        block_size: GIB,
        pool: Some(GIB),
        make: |len| Ok(Box::new(Hugetlb::pages_1g(len)?)),
    },
];

impl Kind {
    /// Pages in the pool for `blocks` plugged blocks, or the reason why there are none.
    pub fn pages(&self, blocks: u64) -> Result<Option<HugePages>, String> {
        self.pool
            .map(|page| HugePages::reserve(page, blocks * self.block_size / page))
            .transpose()
    }
}

/// A device of [`BLOCKS`] blocks and two slots, all of it requested.
pub fn rig_of(kind: &Kind, options: impl FnOnce(Builder) -> Builder) -> Rig {
    let region_size = BLOCKS * kind.block_size;
    let backing = (kind.make)(region_size).unwrap();
    Rig::with_backing(backing, |builder| {
        let builder = builder
            .block_size(kind.block_size)
            .slot_size(BLOCKS / 2 * kind.block_size)
            .requested_size(region_size);
        options(builder)
    })
}

pub fn plug(rig: &mut Rig, kind: &Kind, first: u64, count: u16) -> Response {
    rig.request(Request::Plug(span(kind, first, count)))
}

pub fn unplug(rig: &mut Rig, kind: &Kind, first: u64, count: u16) -> Response {
    rig.request(Request::Unplug(span(kind, first, count)))
}

fn span(kind: &Kind, first: u64, count: u16) -> Span {
    Span {
        addr: REGION + first * kind.block_size,
        block_count: count,
    }
}

/// A file of `len` bytes that holds [`SNAPSHOT_TAG`] everywhere.
fn snapshot(len: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    io::copy(
        &mut io::Read::take(io::repeat(SNAPSHOT_TAG), len),
        &mut file,
    )?;
    Ok(file)
}

/// Says that something was not tested and why, and counts it.
pub fn skip(what: &str, reason: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    // Past the capture of the test runner: a skip must be seen.
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "SKIPPED {what}: {reason} ({count} of this binary)");
}

/// Huge pages added to the host's pool, taken out again when dropped.
///
/// The pool is the whole machine's: whoever holds one of these is the only one, among threads and processes.
#[derive(Debug)]
pub struct HugePages {
    pool: PathBuf,
    before: u64,
    /// Released after the pool is as it was.
    _lock: File,
}

impl HugePages {
    pub fn reserve(page_size: u64, count: u64) -> Result<Self, String> {
        let text = |error: io::Error| error.to_string();
        let lock = std::env::temp_dir().join("virtio-mem-test-huge-pages.lock");
        let lock = File::create(lock).map_err(text)?;
        lock.lock().map_err(text)?;
        let pool = PathBuf::from(format!(
            "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
            page_size >> 10
        ));
        let before = read(&pool).map_err(|error| format!("{}: {error}", pool.display()))?;
        let pages = Self {
            pool,
            before,
            _lock: lock,
        };
        let wanted = before + count;
        pages.set(wanted).map_err(text)?;
        match read(&pages.pool).map_err(text)? {
            got if got == wanted => Ok(pages),
            got => Err(format!(
                "asked for {count} more pages of {} MiB, the kernel gave {}",
                page_size / MIB,
                got.saturating_sub(before)
            )),
        }
    }

    /// Pages of the pool that nobody has taken.
    pub fn free(&self) -> u64 {
        read(&self.pool.with_file_name("free_hugepages")).unwrap()
    }

    fn set(&self, count: u64) -> io::Result<()> {
        std::fs::write(&self.pool, count.to_string())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = self.set(self.before) {
            println!("cannot restore {}: {error}", self.pool.display());
        }
    }
}

fn read(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData.into())
}
