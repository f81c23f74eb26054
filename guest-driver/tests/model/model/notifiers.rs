//! Who is told.

use super::*;

impl Model {
    pub(super) fn told(&self, id: u64, action: MemoryAction, notifier: usize) -> Told {
        let block = &self.blocks[&id];
        let pages = self.pages_of(id);
        Told {
            notifier,
            action,
            start_pfn: pages.start + block.memmap_pages,
            page_count: pages.end - pages.start - block.memmap_pages,
            nid: block.nid,
            early: block.early,
        }
    }

    pub(super) fn notify(&self, id: u64, action: MemoryAction, trail: &mut Trail) -> Outcome {
        let asked = matches!(
            action,
            MemoryAction::GoingOnline | MemoryAction::GoingOffline
        );
        for notifier in &self.chain {
            let answer = match notifier.number {
                None if action == MemoryAction::GoingOffline && self.blocks[&id].early => {
                    Err(Error::NotPermitted)
                }
                None => Ok(()),
                Some(number) => {
                    trail.told.push(self.told(id, action, number));
                    match trail.veto {
                        Some(veto) if veto.notifier == number && veto.action == action => {
                            trail.veto = None;
                            Err(veto.error)
                        }
                        _ => Ok(()),
                    }
                }
            };
            if asked {
                answer?;
            }
        }
        Ok(())
    }
}
