"""Generated sound with questions and answers: speech by espeak-ng, tones and events by arithmetic."""
