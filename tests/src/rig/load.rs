//! Users of memory: pages with tags in them, some of which cannot be moved.
#![expect(unsafe_code, reason = "pages are raw memory")]

use virtio_mem_driver::hotplug::{Error, Hotplug, Mobility, PageHandle, PhysicalMemory};
use vmm_harness::in_process::{Access, Shadow};

use crate::random::Random;

/// A page in use.
#[derive(Debug)]
struct HeldPage {
    handle: PageHandle,
    tag: u64,
    mobility: Mobility,
    pins: u64,
}

/// The pages in use.
#[derive(Debug, Default)]
pub struct Load {
    pages: Vec<HeldPage>,
    next_tag: u64,
}

impl Load {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// How many of them have to stay where they are.
    #[must_use]
    pub fn fixed(&self) -> usize {
        let fixed = |page: &&HeldPage| page.pins > 0 || page.mobility == Mobility::Unmovable;
        self.pages.iter().filter(fixed).count()
    }

    /// Allocates up to `count` pages and writes tags into them; how many it has got.
    ///
    /// # Panics
    ///
    /// If a page that is handed out is not plugged.
    pub fn allocate<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        shadow: &Shadow,
        count: u64,
        mobility: Mobility,
    ) -> u64 {
        for done in 0..count {
            let handle = match hotplug.allocate(mobility) {
                Ok(handle) => handle,
                Err(error) => {
                    assert_eq!(error, Error::NoMemory);
                    return done;
                }
            };
            self.next_tag += 1;
            let tag = self.next_tag;
            access(hotplug, shadow, handle, Access::Write, |words| {
                // SAFETY: the page is pinned, and the caller's alone.
                unsafe { words.write(tag) };
            });
            self.pages.push(HeldPage {
                handle,
                tag,
                mobility,
                pins: 0,
            });
        }
        count
    }

    /// Frees up to `count` pages that are not pinned, any of them.
    ///
    /// # Panics
    ///
    /// If one has lost its tag.
    pub fn free<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        shadow: &Shadow,
        count: u64,
        random: &mut Random,
    ) {
        for _ in 0..count.min(self.pages.len() as u64) {
            let index = random.index(self.pages.len());
            if self.pages[index].pins == 0 {
                let page = self.pages.swap_remove(index);
                page.verify(hotplug, shadow);
                hotplug.free(page.handle).expect("a page in use");
            }
        }
    }

    /// Pins a page; false if there is none.
    ///
    /// # Panics
    ///
    /// If the core does not know it.
    pub fn pin<M: PhysicalMemory>(
        &mut self,
        hotplug: &mut Hotplug<M>,
        random: &mut Random,
    ) -> bool {
        if self.pages.is_empty() {
            return false;
        }
        let index = random.index(self.pages.len());
        let page = &mut self.pages[index];
        hotplug.pin(page.handle).expect("a page in use");
        page.pins += 1;
        true
    }

    /// Takes all pins back.
    ///
    /// # Panics
    ///
    /// If the core does not know of one.
    pub fn unpin<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>) {
        for page in &mut self.pages {
            for _ in 0..std::mem::take(&mut page.pins) {
                hotplug.unpin(page.handle).expect("a pinned page");
            }
        }
    }

    /// Frees everything.
    ///
    /// # Panics
    ///
    /// If a page has lost its tag.
    pub fn clear<M: PhysicalMemory>(&mut self, hotplug: &mut Hotplug<M>, shadow: &Shadow) {
        self.unpin(hotplug);
        for page in self.pages.drain(..) {
            page.verify(hotplug, shadow);
            hotplug.free(page.handle).expect("a page in use");
        }
    }

    /// The machine is gone, and its pages with it.
    pub fn forget(&mut self) {
        self.pages.clear();
    }

    /// Checks every tag.
    ///
    /// # Panics
    ///
    /// If one is lost.
    pub fn verify<M: PhysicalMemory>(&self, hotplug: &mut Hotplug<M>, shadow: &Shadow) {
        for page in &self.pages {
            page.verify(hotplug, shadow);
        }
    }
}

impl HeldPage {
    fn verify<M: PhysicalMemory>(&self, hotplug: &mut Hotplug<M>, shadow: &Shadow) {
        access(hotplug, shadow, self.handle, Access::Read, |word| {
            // SAFETY: the page is pinned, and nobody writes it.
            let found = unsafe { word.read() };
            assert_eq!(found, self.tag, "the tag of page {:?}", self.handle);
        });
    }
}

/// Calls `each` with the first, a middle and the last word of a page, pinned meanwhile.
fn access<M: PhysicalMemory>(
    hotplug: &mut Hotplug<M>,
    shadow: &Shadow,
    page: PageHandle,
    access: Access,
    mut each: impl FnMut(*mut u64),
) {
    let page_size = hotplug.profile().page_size();
    let address = hotplug.address(page).expect("a page in use");
    shadow
        .check("a user of memory", access, address, page_size)
        .expect("only plugged memory is touched");
    let words = hotplug.pin(page).expect("a page in use").cast::<u64>();
    let count = usize::try_from(page_size / 8).expect("words of a page");
    for index in [0, count / 2, count - 1] {
        // SAFETY: the word lies in the page.
        each(unsafe { words.add(index) }.as_ptr());
    }
    hotplug.unpin(page).expect("pinned above");
}
