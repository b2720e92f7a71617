//! Scratch files: what one program makes and deletes again within seconds.
//!
//! A journal of a database, a compiler's intermediate file: between its birth and its end no
//! snapshot was made and nobody looked at the past, and whoever made it deleted it. It is preserved
//! as everything is, and can be brought back until the packer comes to it; then it is forgotten
//! instead of packed, for its bytes would be those of the program's real files a second time.

use crate::error::Result;
use crate::history::packer::{SCRATCH_FORGOTTEN, Step};
use crate::types::ContentId;

use super::Volume;

/// Contents looked at in one step.
const STEP_CONTENTS: usize = 4096;

impl Volume {
    /// Forgets the scratch files among what waits to be packed. The caller packs.
    pub(super) fn forget_scratch(&self, step: Step<'_>) -> Result<()> {
        let mut after = ContentId::EMPTY;
        loop {
            let waiting = self.catalog().waiting_contents(after, STEP_CONTENTS)?;
            let Some(last) = waiting.last() else { return Ok(()) };
            after = last.id;
            let mut nodes = Vec::new();
            for content in &waiting {
                if !self.is_open_orphan(content.node) && self.catalog().is_scratch(content.node)? {
                    nodes.push(content.node);
                }
            }
            nodes.sort_unstable();
            nodes.dedup();
            self.forget_nodes(&nodes)?;
            self.remove_useless()?;
            step(SCRATCH_FORGOTTEN)?;
        }
    }
}
