//! Which replica wins: the pure judgement over what the replicas' markers and catalogs say.
//!
//! Before the first write without a replica, the present ones note it as stale, durably. So of two
//! that were apart: only one moved on, and says so of the other; or both did, and say so of each
//! other. The first is a lagging replica and is filled; the second is a fork, and nobody but the
//! user can judge.
//!
//! | what is seen                                            | what it is                |
//! |---------------------------------------------------------|---------------------------|
//! | equal heads, all clean, nobody says stale               | all current, nothing to do|
//! | A says B is stale, B does not say it of A               | B lags                    |
//! | each of two says it of the other                        | fork                      |
//! | nobody says stale, one sequence higher                  | the higher wins           |
//! | nobody says stale, equal sequence, different chain      | fork                      |
//! | phase `filling`                                         | no whole copy: never wins |

use crate::catalog::Head;
use crate::store::marker::{CleanMark, Phase};

/// What is known of one present replica.
#[derive(Clone, Debug)]
pub struct Standing {
    /// From its marker.
    pub phase: Phase,
    /// From its marker.
    pub clean: Option<CleanMark>,
    /// Its catalog's head; `None` if it has no readable one of this store.
    pub head: Option<Head>,
    /// Which of the present replicas its marker says are stale, by index.
    pub says_stale: Vec<usize>,
}

/// The judgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `winner` has the newest state; of the others those not in `current` must be filled from it.
    Winner {
        /// Index of the winner.
        winner: usize,
        /// For each replica whether it is as new as the winner.
        current: Vec<bool>,
        /// Whether the winner ended cleanly, so that its tree and catalog agree.
        clean: bool,
    },
    /// The adoption of this replica was interrupted.
    Adopting(usize),
    /// These two moved on separately.
    Fork(usize, usize),
    /// No replica has a readable catalog.
    NoCatalog,
    /// All that is present are half-filled copies.
    OnlyPartial,
}

/// Judges. `replicas` is not empty.
pub fn judge(replicas: &[Standing]) -> Verdict {
    assert!(!replicas.is_empty(), "a store has at least one replica");
    for (a, standing) in replicas.iter().enumerate() {
        for &b in &standing.says_stale {
            if replicas[b].says_stale.contains(&a) {
                return Verdict::Fork(a, b);
            }
        }
    }
    if let Some(adopting) = replicas.iter().position(|one| one.phase == Phase::Adopting) {
        return Verdict::Adopting(adopting);
    }
    let whole = |index: &usize| replicas[*index].phase == Phase::Ok;
    if !(0..replicas.len()).any(|index| whole(&index)) {
        return Verdict::OnlyPartial;
    }
    let is_stale = |index: usize| replicas.iter().any(|one| one.says_stale.contains(&index));
    // A stale one may win only if every other catalog is lost: old history beats none, and the user
    // is told by the fill that follows.
    let with_head = |stale: bool| {
        let fitting =
            (0..replicas.len()).filter(whole).filter(move |&index| is_stale(index) == stale);
        fitting
            .filter_map(|index| Some((index, replicas[index].head.as_ref()?)))
            .collect::<Vec<_>>()
    };
    let mut candidates = with_head(false);
    if candidates.is_empty() {
        candidates = with_head(true);
    }
    let Some(&(winner, head)) = candidates.iter().rev().max_by_key(|(_, head)| head.sequence)
    else {
        return Verdict::NoCatalog;
    };
    let rival = candidates
        .iter()
        .find(|(_, other)| other.sequence == head.sequence && other.chain != head.chain);
    if let Some(&(rival, _)) = rival {
        return Verdict::Fork(winner, rival);
    }
    let is_clean = |one: &Standing| one.clean.as_ref().is_some_and(|mark| mark.fits(head));
    let current = (0..replicas.len())
        .map(|index| {
            index == winner
                || whole(&index)
                    && !is_stale(index)
                    && replicas[index].head.as_ref() == Some(head)
                    && is_clean(&replicas[index])
        })
        .collect();
    Verdict::Winner { winner, current, clean: is_clean(&replicas[winner]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Generation;

    fn head(sequence: u64, chain: u8) -> Head {
        Head {
            store: uuid::Uuid::nil(),
            sequence,
            chain: [chain; 32],
            generation: Generation(sequence),
        }
    }

    fn clean(sequence: u64, chain: u8) -> Standing {
        let head = head(sequence, chain);
        let mark = Some(CleanMark::of(&head));
        Standing { phase: Phase::Ok, clean: mark, head: Some(head), says_stale: Vec::new() }
    }

    fn winner(winner: usize, current: &[bool], clean: bool) -> Verdict {
        Verdict::Winner { winner, current: current.to_vec(), clean }
    }

    #[test]
    fn equal_clean_heads_are_all_current() {
        assert_eq!(judge(&[clean(5, 1), clean(5, 1)]), winner(0, &[true, true], true));
    }

    #[test]
    fn the_longer_history_wins() {
        assert_eq!(judge(&[clean(5, 1), clean(7, 2)]), winner(1, &[false, true], true));
    }

    #[test]
    fn who_was_left_behind_lags_even_with_more_batches() {
        let mut survivor = clean(7, 2);
        survivor.says_stale = vec![1];
        assert_eq!(judge(&[survivor, clean(8, 3)]), winner(0, &[true, false], true));
    }

    #[test]
    fn two_that_left_each_other_behind_are_a_fork() {
        let (mut a, mut b) = (clean(7, 2), clean(9, 3));
        (a.says_stale, b.says_stale) = (vec![1], vec![0]);
        assert_eq!(judge(&[a, b]), Verdict::Fork(0, 1));
        assert_eq!(judge(&[clean(5, 1), clean(5, 2)]), Verdict::Fork(0, 1));
    }

    #[test]
    fn after_a_crash_one_wins_and_the_others_are_compared_with_it() {
        let (mut a, mut b) = (clean(5, 1), clean(5, 1));
        (a.clean, b.clean) = (None, None);
        assert_eq!(judge(&[a, b]), winner(0, &[true, false], false));
    }

    #[test]
    fn a_mark_that_does_not_fit_the_catalog_is_not_clean() {
        let mut a = clean(5, 1);
        a.clean = Some(CleanMark::of(&head(4, 1)));
        assert_eq!(judge(&[a]), winner(0, &[true], false));
    }

    #[test]
    fn half_filled_copies_and_lost_catalogs_never_win() {
        let (mut filling, mut lost) = (clean(9, 9), clean(5, 1));
        filling.phase = Phase::Filling;
        lost.head = None;
        assert_eq!(judge(&[filling.clone(), clean(5, 1)]), winner(1, &[false, true], true));
        assert_eq!(judge(&[lost.clone(), clean(5, 1)]), winner(1, &[false, true], true));
        assert_eq!(judge(&[filling]), Verdict::OnlyPartial);
        assert_eq!(judge(&[lost]), Verdict::NoCatalog);
    }

    #[test]
    fn an_interrupted_adoption_goes_on() {
        let (mut adopting, mut filling) = (clean(1, 1), clean(0, 0));
        (adopting.phase, filling.phase) = (Phase::Adopting, Phase::Filling);
        assert_eq!(judge(&[filling, adopting]), Verdict::Adopting(1));
    }
}
