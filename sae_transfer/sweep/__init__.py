"""A grid of studies as batch jobs: expanded into frozen study files, grouped, submitted, watched and reported on."""
