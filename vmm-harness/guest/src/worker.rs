//! A worker: somebody who uses memory and notices when it is not what it should be.
#![expect(unsafe_code, reason = "pages are raw memory")]

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use virtio_mem_driver::hotplug::{Hotplug, Mobility, PageHandle, PhysicalMemory};

use crate::abi::WorkerCounters;
use crate::lock::SpinLock;
use crate::pattern::{Pattern, Random};

/// Pages a slice deals with: some ten microseconds of work, so that the driver is not kept waiting.
const PAGES_PER_SLICE: usize = 16;

/// Most pages that cannot be moved.
const UNMOVABLE_PAGES: usize = 128;

/// A page of this worker's.
#[derive(Clone, Copy, Debug)]
struct HeldPage {
    handle: PageHandle,
    sequence: u64,
}

/// A page that cannot be moved for a while.
#[derive(Clone, Copy, Debug)]
struct UnmovablePage {
    page: HeldPage,
    /// Pinned, and not merely in memory for a kernel's own use.
    pinned: bool,
    /// The slice in which it is given back.
    until: u64,
}

/// What a worker may have.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Allowance {
    /// Pages.
    pub(crate) pages: u64,
    /// Of how many pages written one may not be movable.
    pub(crate) unmovable_one_in: Option<usize>,
}

/// Holds pages, each with a pattern of its own.
///
/// The lock on the bookkeeping is held to allocate, free, pin and unpin, never while a page is accessed.
pub(crate) struct Worker<'a, M, R> {
    hotplug: &'a SpinLock<Hotplug<M>>,
    counters: &'a WorkerCounters,
    relax: R,
    seed: u64,
    index: u64,
    node_count: u32,
    random: Random,
    held: Vec<HeldPage>,
    unmovable: Vec<UnmovablePage>,
    /// Number of slices so far.
    clock: u64,
    /// Number of pages written so far.
    sequence: u64,
}

impl<'a, M: PhysicalMemory, R: Fn()> Worker<'a, M, R> {
    pub(crate) fn new(
        hotplug: &'a SpinLock<Hotplug<M>>,
        counters: &'a WorkerCounters,
        relax: R,
        seed: u64,
        index: u64,
        node_count: u32,
    ) -> Self {
        Self {
            hotplug,
            counters,
            relax,
            seed,
            index,
            node_count,
            random: Random::new(seed, index),
            held: Vec::new(),
            unmovable: Vec::new(),
            clock: 0,
            sequence: 0,
        }
    }

    /// Does a little work; `false` if there is none.
    pub(crate) fn slice(&mut self, allowance: Allowance) -> bool {
        self.clock += 1;
        self.let_go(self.clock);
        let worked = (0..PAGES_PER_SLICE)
            .take_while(|_| self.work(allowance))
            .count();
        if worked > 0 {
            add(&self.counters.slices, 1);
        }
        let unmovable = self.unmovable.len() as u64;
        let held = self.held.len() as u64 + unmovable;
        self.counters.pages_held.store(held, Ordering::Relaxed);
        let counter = &self.counters.pages_unmovable;
        counter.store(unmovable, Ordering::Relaxed);
        worked > 0
    }

    /// Verifies and frees everything.
    pub(crate) fn finish(mut self) {
        self.let_go(u64::MAX);
        while self.slice(Allowance::default()) {}
    }

    /// Deals with one page.
    fn work(&mut self, allowance: Allowance) -> bool {
        let held = self.held.len() as u64;
        if held > allowance.pages {
            self.give_back();
            return true;
        }
        // Growing is likelier than shrinking, so that there is soon as much to verify as there may be.
        let choice = self.random.below(8);
        if held < allowance.pages && (choice < 4 || held == 0) {
            let unmovable = allowance.unmovable_one_in;
            let room = (self.unmovable.len() as u64) < allowance.pages / 2;
            let unmovable = unmovable.is_some_and(|one_in| room && self.random.below(one_in) == 0);
            if unmovable && self.write_unmovable() || self.write() {
                return true;
            }
        }
        match (held, choice) {
            (0, _) if self.unmovable.is_empty() => return false,
            // Until it is given back there is nothing else to do.
            (0, _) => {
                let index = self.random.below(self.unmovable.len());
                if !self.check(self.unmovable[index].page, false) {
                    self.unmovable.swap_remove(index);
                }
            }
            (_, 7) => self.give_back(),
            _ => self.verify(),
        }
        true
    }

    /// Allocates a page and fills it; `false` if there is none.
    fn write(&mut self) -> bool {
        if self.held.try_reserve(1).is_err() {
            return false;
        }
        let Some(page) = self.allocate(Mobility::Movable) else {
            return false;
        };
        self.held.push(page);
        true
    }

    /// As [`write`](Self::write), a page that stays where it is for a while: pinned as one is that a device writes to,
    /// pinned for a time without end, which Linux does not do in Movable, or allocated for a kernel's own use.
    fn write_unmovable(&mut self) -> bool {
        let full = self.unmovable.len() >= UNMOVABLE_PAGES;
        if full || self.unmovable.try_reserve(1).is_err() || self.held.try_reserve(1).is_err() {
            return false;
        }
        let kind = self.random.below(3);
        let mobility = match kind {
            0 => Mobility::Unmovable,
            _ => Mobility::Movable,
        };
        let Some(page) = self.allocate(mobility) else {
            return false;
        };
        let mut hotplug = self.hotplug.lock(&self.relax);
        let pinned = match kind {
            0 => false,
            1 => hotplug.pin(page.handle).is_ok(),
            _ => hotplug.pin_long_term(page.handle).is_ok(),
        };
        drop(hotplug);
        if kind != 0 && !pinned {
            // No kernel zone has room for it: it is one that can be moved, then.
            self.held.push(page);
            return true;
        }
        // Some for a moment, some for long.
        let longest = 1 << (4 + self.random.below(9));
        let until = self.clock + self.random.below(longest) as u64;
        let unmovable = UnmovablePage {
            page,
            pinned,
            until,
        };
        self.unmovable.push(unmovable);
        true
    }

    /// Verifies and frees the pages that cannot be moved whose time has come at slice `now`.
    fn let_go(&mut self, now: u64) {
        for index in (0..self.unmovable.len()).rev() {
            let UnmovablePage {
                page,
                pinned,
                until,
            } = self.unmovable[index];
            if until > now {
                continue;
            }
            self.unmovable.swap_remove(index);
            let unpinned = match pinned {
                true => self.hotplug.lock(&self.relax).unpin(page.handle),
                false => Ok(()),
            };
            match unpinned {
                Ok(()) => {
                    self.check(page, true);
                }
                // It was not kept where it was to stay.
                Err(_) => add(&self.counters.pages_wrong, 1),
            }
        }
    }

    fn allocate(&mut self, mobility: Mobility) -> Option<HeldPage> {
        // Of any node, so that there is something in each device's memory.
        let node = self.random.below(self.node_count as usize) as u32;
        let mut hotplug = self.hotplug.lock(&self.relax);
        let handle = hotplug.allocate_on(node, mobility).ok()?;
        let pinned = hotplug.pin(handle);
        drop(hotplug);
        let sequence = self.sequence;
        self.sequence += 1;
        // It was allocated a moment ago; should that be lost, `verify` finds it so.
        if let Ok(page) = pinned {
            // SAFETY: The page is pinned, so it stays where it is, and only this worker has its handle.
            unsafe { self.pattern(sequence).fill(page) };
            let _pinned_above = self.hotplug.lock(&self.relax).unpin(handle);
        }
        add(&self.counters.pages_written, 1);
        Some(HeldPage { handle, sequence })
    }

    /// Reads a page at random.
    fn verify(&mut self) {
        let index = self.random.below(self.held.len());
        if !self.check(self.held[index], false) {
            self.held.swap_remove(index);
        }
    }

    /// Reads a page at random, and frees it.
    fn give_back(&mut self) {
        let index = self.random.below(self.held.len());
        let page = self.held.swap_remove(index);
        self.check(page, true);
    }

    /// Reads a page in full and counts what was found. A wrong page is freed too, it is not wrong twice.
    fn check(&self, page: HeldPage, free: bool) -> bool {
        let pinned = self.hotplug.lock(&self.relax).pin(page.handle);
        let right = pinned.is_ok_and(|memory| {
            // SAFETY: The page is pinned, so it stays where it is, and only this worker has its handle.
            unsafe { self.pattern(page.sequence).matches(memory) }
        });
        let mut hotplug = self.hotplug.lock(&self.relax);
        let unpinned = hotplug.unpin(page.handle);
        let freed = match free || !right {
            true => hotplug.free(page.handle),
            false => Ok(()),
        };
        drop(hotplug);
        let right = right && unpinned.is_ok() && freed.is_ok();
        let counter = match right {
            true => &self.counters.pages_verified,
            false => &self.counters.pages_wrong,
        };
        add(counter, 1);
        right
    }

    fn pattern(&self, sequence: u64) -> Pattern {
        Pattern::new(self.seed, self.index, sequence)
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::UnsafeCell;
    use std::ptr::NonNull;

    use virtio_mem_driver::hotplug::{AddMemory, OnlineType, Profile};

    use super::*;
    use crate::abi::Mailbox;

    /// A mailbox as the host makes it: zeroes.
    pub(crate) fn mailbox() -> Box<Mailbox> {
        // SAFETY: A mailbox is made of atomic integers.
        unsafe { Box::new_zeroed().assume_init() }
    }

    /// One memory block of 32 pages.
    const PROFILE: Profile = Profile {
        page_shift: 12,
        pageblock_shift: 14,
        sub_section_shift: 14,
        section_shift: 17,
        memory_block_shift: 17,
        ..Profile::X86_64
    };
    const PAGES: usize = 32;

    struct Pages(Vec<UnsafeCell<[u64; 512]>>);

    // SAFETY: Each address has its own page, which lives as long as this.
    unsafe impl PhysicalMemory for Pages {
        fn page(&self, address: u64) -> NonNull<u8> {
            let page = &self.0[(address >> 12) as usize];
            NonNull::new(page.get()).unwrap().cast()
        }
    }

    fn hotplug() -> SpinLock<Hotplug<Pages>> {
        let pages = (0..2 * PAGES).map(|_| UnsafeCell::new([0; 512])).collect();
        let mut hotplug = Hotplug::new(PROFILE, Pages(pages)).unwrap();
        hotplug.add_memory(&AddMemory::new(0, 1 << 17)).unwrap();
        hotplug.online(0, OnlineType::Movable).unwrap();
        SpinLock::new(hotplug)
    }

    fn worker<'a>(
        hotplug: &'a SpinLock<Hotplug<Pages>>,
        counters: &'a WorkerCounters,
    ) -> Worker<'a, Pages, fn()> {
        Worker::new(hotplug, counters, || (), 42, 1, 1)
    }

    fn pages(pages: u64) -> Allowance {
        Allowance {
            pages,
            unmovable_one_in: None,
        }
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    #[test]
    fn worker_fills_its_allowance_and_gives_everything_back() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        let most = (0..100)
            .map(|_| {
                assert!(worker.slice(pages(20)));
                get(&counters.pages_held)
            })
            .max();
        assert_eq!(most, Some(20));
        // Less is allowed now: the excess goes at once.
        worker.slice(pages(3));
        worker.slice(pages(3));
        assert!(get(&counters.pages_held) <= 3);
        worker.finish();
        assert_eq!(get(&counters.pages_held), 0);
        assert_eq!(get(&counters.pages_wrong), 0);
        assert!(get(&counters.pages_verified) >= get(&counters.pages_written));
        let hotplug = hotplug.lock(|| ());
        assert_eq!(hotplug.counts().free, PAGES as u64);
        hotplug.check_invariants().unwrap();
    }

    #[test]
    fn worker_without_memory_or_allowance_has_no_work() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        assert!(!worker(&hotplug, &counters).slice(pages(0)));
        hotplug.lock(|| ()).offline(0).unwrap();
        assert!(!worker(&hotplug, &counters).slice(pages(10)));
        assert_eq!(get(&counters.slices), 0);
    }

    #[test]
    fn pages_that_are_moved_stay_right() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        for pageblock in (0..8).cycle().take(400) {
            worker.slice(pages(8));
            let mut hotplug = hotplug.lock(|| ());
            hotplug.fake_offline(pageblock << 14, 1 << 14).unwrap();
            hotplug.fake_online(pageblock << 14, 1 << 14).unwrap();
        }
        assert!(hotplug.lock(|| ()).statistics().pages_migrated > 100);
        worker.finish();
        assert_eq!(get(&counters.pages_wrong), 0);
    }

    #[test]
    fn pages_that_cannot_be_moved_are_given_back_in_time() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        // Half of the memory is a kernel's own, so that there is room for all three kinds.
        {
            let mut hotplug = hotplug.lock(|| ());
            hotplug
                .add_memory(&AddMemory::new(1 << 17, 1 << 17))
                .unwrap();
            hotplug.online(1, OnlineType::Kernel).unwrap();
        }
        let mut worker = worker(&hotplug, &counters);
        let many = Allowance {
            pages: 16,
            unmovable_one_in: Some(2),
        };
        let (mut most, mut stuck, mut pinned, mut kernels) = (0, 0, 0, 0);
        for slice in 0..2000 {
            worker.slice(many);
            most = most.max(get(&counters.pages_unmovable));
            assert_eq!(
                get(&counters.pages_unmovable),
                worker.unmovable.len() as u64
            );
            pinned += worker.unmovable.iter().filter(|page| page.pinned).count();
            kernels += worker.unmovable.iter().filter(|page| !page.pinned).count();
            let start = (slice % 8) << 14;
            let mut hotplug = hotplug.lock(|| ());
            match hotplug.fake_offline(start, 1 << 14) {
                Ok(()) => hotplug.fake_online(start, 1 << 14).unwrap(),
                Err(_) => stuck += 1,
            }
        }
        assert!((1..=8).contains(&most), "{most}");
        assert!(pinned > 0 && kernels > 0, "{pinned} {kernels}");
        assert!(stuck > 0, "pins are in nobody's way");
        // None are added, and the last one goes: the longest time is 2^12 slices.
        let none = Allowance {
            unmovable_one_in: None,
            ..many
        };
        for _ in 0..=1 << 12 {
            worker.slice(none);
        }
        assert_eq!(get(&counters.pages_unmovable), 0);
        assert!(get(&counters.pages_held) > 0);
        worker.slice(many);
        worker.finish();
        assert_eq!(get(&counters.pages_held), 0);
        assert_eq!(get(&counters.pages_wrong), 0);
        let hotplug = hotplug.lock(|| ());
        assert_eq!(hotplug.counts().free, 2 * PAGES as u64);
        hotplug.check_invariants().unwrap();
    }

    #[test]
    fn a_page_that_lost_its_pin_is_wrong() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        let allowance = Allowance {
            pages: 16,
            unmovable_one_in: Some(1),
        };
        while worker.unmovable.is_empty() {
            worker.slice(allowance);
        }
        let victim = worker.unmovable[0].page.handle;
        assert!(worker.unmovable[0].pinned);
        hotplug.lock(|| ()).unpin(victim).unwrap();
        worker.finish();
        assert_eq!(get(&counters.pages_wrong), 1);
    }

    #[test]
    fn corrupted_page_is_counted_once() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        while get(&counters.pages_held) < 8 {
            worker.slice(pages(8));
        }
        let victim = worker.held[3].handle;
        {
            let mut hotplug = hotplug.lock(|| ());
            let page = hotplug.pin(victim).unwrap();
            // SAFETY: A pinned page nobody else touches.
            let bytes = unsafe { page.cast::<[u8; 4096]>().as_mut() };
            bytes[4095] ^= 1;
            hotplug.unpin(victim).unwrap();
        }
        worker.finish();
        assert_eq!(get(&counters.pages_wrong), 1);
        assert_eq!(hotplug.lock(|| ()).counts().free, PAGES as u64);
    }

    #[test]
    fn lost_page_is_counted_as_wrong() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        while get(&counters.pages_held) < 8 {
            worker.slice(pages(8));
        }
        hotplug.lock(|| ()).free(worker.held[0].handle).unwrap();
        worker.finish();
        assert_eq!(get(&counters.pages_wrong), 1);
    }

    #[test]
    fn pages_that_are_mixed_up_are_both_wrong() {
        let (hotplug, counters) = (hotplug(), WorkerCounters::default());
        let mut worker = worker(&hotplug, &counters);
        while get(&counters.pages_held) < 8 {
            worker.slice(pages(8));
        }
        let sequence = worker.held[0].sequence;
        worker.held[0].sequence = core::mem::replace(&mut worker.held[1].sequence, sequence);
        worker.finish();
        assert_eq!(get(&counters.pages_wrong), 2);
    }
}
