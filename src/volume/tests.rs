//! Tests of the volume that need its insides.

use super::*;

mod faults;
mod growth;
