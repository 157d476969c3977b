"""The labelled zoo: real small trainings, sick, cured and healthy, and how each is judged."""
